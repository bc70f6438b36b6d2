package trial

import "time"

// progress guesses how long a run still takes, by the visits that it has planned and made.
type progress struct {
	sections []sectionProgress
}

type sectionProgress struct {
	planned, made int
	took          time.Duration
}

// left is about what the visits take that were not made yet: each as others of its section did, and where there were
// none, as the mean of all. It says no where nothing is known yet.
func (p *progress) left() (left time.Duration, ok bool) {
	var all sectionProgress
	for _, s := range p.sections {
		all.made += s.made
		all.took += s.took
	}
	if all.made == 0 {
		return 0, false
	}
	for _, s := range p.sections {
		of := s
		if s.made == 0 {
			of = all
		}
		left += of.took / time.Duration(of.made) * time.Duration(s.planned-s.made)
	}
	return left, true
}
