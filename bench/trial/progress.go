package trial

import "time"

// progress guesses how long a run still takes, by the visits that it has planned and made.
type progress struct {
	sections []sectionProgress
}

type sectionProgress struct {
	// planned are the visits of all rounds, first those of the first one, which is made whatever the budget.
	planned, first, made int
	took                 time.Duration
}

// round is about what one more round of all takes.
func (p *sectionProgress) round() time.Duration {
	return p.took / time.Duration(max(p.made, 1)) * time.Duration(p.first)
}

// left is about what the visits take that were not made yet: each as others of its section did, and where there were
// none, as the mean of all. Rounds after the first are made only within what is left of the budget. It says no where
// nothing is known yet.
func (p *progress) left(budget time.Duration) (left time.Duration, ok bool) {
	var all sectionProgress
	for _, s := range p.sections {
		all.made += s.made
		all.took += s.took
	}
	if all.made == 0 {
		return 0, false
	}
	least := time.Duration(0)
	for _, s := range p.sections {
		of := s
		if s.made == 0 {
			of = all
		}
		each := of.took / time.Duration(of.made)
		left += each * time.Duration(s.planned-s.made)
		least += each * time.Duration(max(s.first-s.made, 0))
	}
	return min(left, max(least, budget)), true
}
