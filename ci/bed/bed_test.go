package bed

import (
	"errors"
	"regexp"
	"strings"
	"testing"
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
