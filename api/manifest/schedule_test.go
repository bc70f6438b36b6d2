package manifest

import (
	"strings"
	"testing"

	"github.com/bmatcuk/doublestar/v4"
	"github.com/robfig/cron/v3"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// accepts says whether a DataLoad with the schedule or path passes its rules.
func accepts(t testing.TB, change func(*v1alpha1.DataLoadSpec)) bool {
	l := &v1alpha1.DataLoad{}
	l.Name = "warm"
	l.Spec.DatasetRef.Name = "genomes"
	change(&l.Spec)
	errs := Validate(t.Context(), l)
	for _, err := range errs {
		if strings.Contains(err.Error(), "evaluating rule") || strings.Contains(err.Error(), "budget") {
			t.Errorf("a rule broke: %v", err)
		}
	}
	return len(errs) == 0
}

func schedule(s string) func(*v1alpha1.DataLoadSpec) {
	return func(spec *v1alpha1.DataLoadSpec) { spec.Schedule = v1alpha1.Schedule(s) }
}

func pattern(p string) func(*v1alpha1.DataLoadSpec) {
	return func(spec *v1alpha1.DataLoadSpec) { spec.Paths = []v1alpha1.PathPattern{v1alpha1.PathPattern(p)} }
}

func TestSchedules(t *testing.T) {
	for s, want := range map[string]bool{
		"0 3 * * *": true, "*/15 * * * *": true, "0 0 1 1 0": true, "59 23 31 12 6": true, "5/10 * * * *": true,
		"0 9-17/2 * * MON-FRI": true, "0 0 1,15 * *": true, "0 0 * jan,Jul sun": true, "00 03 * 01-12 *": true,
		"0 0 1-5,10-15/2,20 JAN-MAR,DEC *": true, "* * * * 0-6": true, "0 0 * * SUN-SAT": true,
		"@daily": true, "@hourly": true, "@weekly": true, "@monthly": true, "@yearly": true, "@annually": true, "@midnight": true,

		"60 * * * *": false, "0 24 * * *": false, "0 0 0 * *": false, "0 0 32 * *": false, "0 0 * 0 *": false, "0 0 * 13 *": false,
		"0 0 * * 7": false, "0 0 * *": false, "0 0 * * * *": false, "": true /* absent */, " 0 3 * * *": false, "0  3 * * *": false, "0 3 * * * ": false,
		"5-1 * * * *": false, "0 0 * * FRI-MON": false, "0 0 * DEC-JAN *": false, "*/0 * * * *": false, "1- * * * *": false, "1,,2 * * * *": false,
		"0 0 * * MON-5": false, "0 0 * * FOO": false, "@every 1h": false, "@reboot": false, "TZ=UTC 0 3 * * *": false, "? * * * *": false, "a b c d e": false,
		"-1 * * * *": false, "1-2-3 * * * *": false, "0 3 * * *\n": false,
	} {
		if got := accepts(t, schedule(s)); got != want {
			t.Errorf("schedule %q: accepted %v, want %v", s, got, want)
		}
		if _, err := cron.ParseStandard(s); want && s != "" && err != nil {
			t.Errorf("schedule %q is accepted, and the parser says %v", s, err)
		}
	}
	// Every pair of names, since the rule for ranges finds names within one text.
	for _, names := range [][]string{
		{"SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"},
		{"JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"},
	} {
		for i, a := range names {
			for j, b := range names {
				s := "0 0 * " + a + "-" + b + " *"
				if len(names) == 7 {
					s = "0 0 * * " + a + "-" + strings.ToLower(b)
				}
				if got := accepts(t, schedule(s)); got != (i <= j) {
					t.Errorf("schedule %q: accepted %v", s, got)
				}
			}
		}
	}
}

func TestPatterns(t *testing.T) {
	for p, want := range map[string]bool{
		"/": true, "/**": true, "/shards/**": true, "/shards/": true, "/a/**/*.fa": true, "/a?b": true, "/[a-c]*": true, "/[!a]": true, "/[^a-c,x]": true,
		"/{a,b}/x": true, "/{**,x}/y": true, `/a\[b`: true, `/a\{b\}`: true, "/{a,[b-d]}": true, "/ä": true, "/a b": true, "/...": true, `/[\]]`: true,

		"": false, "a": false, "**": false, "/a//b": false, "/..": false, "/../a": false, "/a/./b": false, "/a/.": false,
		"/[a": false, "/a]": false, "/[]": false, "/{a": false, "/a}": false, "/{a,{b,c}}": false, `/a\`: false, "/a**": false, "/**.fa": false, "/***": false,
		"/[a-]": false, "/[-a]": false, "/a\nb": false, "/a\x7f": false, "/" + strings.Repeat("a", 512): false,
	} {
		if got := accepts(t, pattern(p)); got != want {
			t.Errorf("pattern %q: accepted %v, want %v", p, got, want)
		}
		if want && !doublestar.ValidatePattern(p) {
			t.Errorf("pattern %q is accepted, and the matcher refuses it", p)
		}
	}
}

func FuzzSchedule(f *testing.F) {
	for _, s := range []string{"0 3 * * *", "@daily", "*/5 1-4,6 1/2 JAN-MAR sun", "5-1 * * * *", "0 0 * * FRI-MON"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if s == "" || !accepts(t, schedule(s)) {
			return
		}
		if _, err := cron.ParseStandard(s); err != nil {
			t.Errorf("schedule %q is accepted, and the parser says %v", s, err)
		}
	})
}

func FuzzPattern(f *testing.F) {
	for _, s := range []string{"/shards/**", "/[a-c]{x,y}?", `/\[`, "/{**,[!a]}", "/a/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if !accepts(t, pattern(s)) {
			return
		}
		l := v1alpha1.DataLoad{Spec: v1alpha1.DataLoadSpec{Paths: []v1alpha1.PathPattern{v1alpha1.PathPattern(s)}}}
		for _, p := range append(l.Patterns(), s) {
			for _, path := range []string{"/", "/a", "/a/b/c.fa", s} {
				if _, err := doublestar.Match(p, path); err != nil {
					t.Errorf("pattern %q is accepted, and the matcher says %v", p, err)
				}
			}
		}
	})
}
