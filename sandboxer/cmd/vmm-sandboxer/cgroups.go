package main

import (
	"context"
	"errors"
	"io/fs"

	"kuasar.io/kuasar/sandboxer/cgroup"
	"kuasar.io/kuasar/sandboxer/pod"
)

// cgroups makes the leaves of the pods in one base directory, and finds them again.
type cgroups struct{ owner string }

func (c cgroups) make(parent, name string) (pod.Cgroup, error) {
	g, err := cgroup.New(parent, name)
	if err != nil {
		return nil, err
	}
	if err := g.Mark(c.owner); err != nil {
		return nil, errors.Join(err, g.Delete(context.Background()))
	}
	return g, nil
}

// load finds a pod's leaf. One that is missing may be there in part, because the daemon was killed
// while it made or removed it, so it is made whole: Delete then finds all of it.
//
// Without a parent it is looked for everywhere: the journal that named the parent may be lost. A name
// alone is no proof then that the leaf is a pod's, so it must bear the mark.
func (c cgroups) load(parent, name string) (pod.Cgroup, error) {
	g, err := cgroup.Load(parent, name)
	if errors.Is(err, fs.ErrNotExist) && parent == "" {
		g, err = cgroup.FindOwned(name, c.owner)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return c.make(parent, name)
	}
	return orNil[pod.Cgroup](g, err)
}

func (c cgroups) list() ([]string, error) {
	groups, err := cgroup.Owned(c.owner)
	var names []string
	for _, g := range groups {
		names = append(names, g.Name())
	}
	return names, err
}
