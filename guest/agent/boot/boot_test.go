package boot

import (
	"reflect"
	"testing"
)

func TestHierarchies(t *testing.T) {
	got := hierarchies(`#subsys_name	hierarchy	num_cgroups	enabled
cpuset	0	1	1
cpu	0	1	1
cpuacct	0	1	1
blkio	0	1	1
memory	0	1	0
net_cls	0	1	1
net_prio	0	1	0
pids	0	1	1
`)
	if want := []string{"cpuset", "cpu,cpuacct", "blkio", "net_cls", "pids"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
