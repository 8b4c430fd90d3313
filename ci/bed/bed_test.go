package bed

import (
	"errors"
	"regexp"
	"slices"
	"strings"
	"testing"

	"kuasar.io/kuasar/ci/build"
)

func TestPhasesEndWithTheFirstFailure(t *testing.T) {
	broken := errors.New("broken")
	var ran []string
	phaseOf := func(name string, err error) phase {
		return phase{name, func() error { ran = append(ran, name); return err }}
	}
	var out strings.Builder
	err := inOrder([]phase{phaseOf("first", nil), phaseOf("second", broken), phaseOf("third", nil)}, &out)
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "second") {
		t.Errorf("the error is %v", err)
	}
	if got := strings.Join(ran, " "); got != "first second" {
		t.Errorf("ran: %s", got)
	}
	want := regexp.MustCompile(`^==== first\n==== first: ok, \S+\n==== second\n==== second: FAILED after \S+\n$`)
	if !want.MatchString(out.String()) {
		t.Errorf("it says:\n%s", out.String())
	}
}

// Every package of the end-to-end module is in one of the three phases.
func TestPackagesBut(t *testing.T) {
	all, err := packagesBut(t.Context(), build.Tree{Root: "../.."}, nil)
	if err != nil {
		t.Fatal(err)
	}
	apart := slices.Concat(onSystemd, onNodeOnly)
	others, err := packagesBut(t.Context(), build.Tree{Root: "../.."}, apart)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range apart {
		if !slices.Contains(all, name) || slices.Contains(others, name) {
			t.Errorf("%s is not among %q, or is among %q", name, all, others)
		}
	}
	if !slices.Contains(others, "./.") || len(others) != len(all)-len(apart) {
		t.Errorf("without %q there are %q of %q", apart, others, all)
	}
}
