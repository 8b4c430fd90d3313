package cgroup

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOwned(t *testing.T) {
	pid := strconv.Itoa(os.Getpid())
	mine, other, nobody := "pod-mine-"+pid, "pod-other-"+pid, "pod-nobody-"+pid
	parent := "/kuasar-test-owner-" + pid + "/burstable"
	g := realGroup(t, parent, mine)
	if err := g.Mark("/run/mine-" + pid); err != nil {
		t.Fatal(err)
	}
	if err := realGroup(t, parent, other).Mark("/run/other-" + pid); err != nil {
		t.Fatal(err)
	}
	realGroup(t, parent, nobody)
	if _, err := unix.Getxattr(g.dir(g.host.roots()[0]), ownerMark, make([]byte, 8)); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("this kernel keeps no attributes of cgroups")
	}

	owned := func() (paths []string) {
		groups, err := Owned("/run/mine-" + pid)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range groups {
			paths = append(paths, g.Path())
		}
		return paths
	}
	if got := owned(); !slices.Equal(got, []string{parent + "/" + mine}) {
		t.Errorf("owned: %q", got)
	}
	found, err := FindOwned(mine, "/run/mine-"+pid)
	if err != nil || found.Path() != g.Path() || found.Name() != mine {
		t.Errorf("found %v, %v", found, err)
	}
	// A name alone proves nothing.
	for _, name := range []string{other, nobody, "pod-never-" + pid} {
		if g, err := FindOwned(name, "/run/mine-"+pid); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: found %v, %v", name, g, err)
		}
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := owned(); len(got) > 0 {
		t.Errorf("owned after Delete: %q", got)
	}
}
