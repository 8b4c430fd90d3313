package cgroup

import (
	"errors"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/protobuf/proto"
)

func TestDetect(t *testing.T) {
	const table2 = `25 30 0:22 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate`
	const hybrid = `31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
37 31 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw`
	for name, tc := range map[string]struct {
		table, controllers string
		roots              []string
	}{
		"v2":             {table2, "cpuset cpu io memory pids", []string{"/sys/fs/cgroup"}},
		"hybrid":         {hybrid, "hugetlb", []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/pids"}},
		"v2 without any": {table2, "", nil},
		"none":           {"", "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			mounts, err := mountinfo.GetMountsFromReader(strings.NewReader(tc.table), mountinfo.FSTypeFilter("cgroup", "cgroup2"))
			if err != nil {
				t.Fatal(err)
			}
			h, err := detect(mounts, func(string) ([]byte, error) { return []byte(tc.controllers), nil })
			if tc.roots == nil {
				if err == nil {
					t.Errorf("found %v", h)
				}
				return
			}
			if err != nil || !slices.Equal(h.roots(), tc.roots) {
				t.Errorf("got %v, %v; want %v", h, err, tc.roots)
			}
		})
	}
}

func TestExpand(t *testing.T) {
	for parent, want := range map[string]string{
		"":                             "kuasar-vmm",
		"/":                            "",
		"/kubepods/burstable/pod1":     "kubepods/burstable/pod1",
		"kubepods//besteffort/":        "kubepods/besteffort",
		"kubepods.slice":               "kubepods.slice",
		"kubepods-besteffort.slice":    "kubepods.slice/kubepods-besteffort.slice",
		"/kubepods-a-podb_c.slice":     "kubepods.slice/kubepods-a.slice/kubepods-a-podb_c.slice",
		"-.slice":                      "",
		"/kubepods.slice/k-pod1.slice": "kubepods.slice/k-pod1.slice",
	} {
		if got, err := expand(parent); got != want || err != nil {
			t.Errorf("expand(%q) = %q, %v; want %q", parent, got, err, want)
		}
	}
	for _, parent := range []string{"..", "/a/../b", "a--b.slice", "-a.slice", "/a\x00", "/" + strings.Repeat("a", 256)} {
		if got, err := expand(parent); err == nil {
			t.Errorf("expand(%q) = %q", parent, got)
		}
	}
}

// fakeV1 is a host whose hierarchies are plain directories.
func fakeV1(t *testing.T) *host {
	top := t.TempDir()
	h := &host{v1: map[string]string{}}
	for _, c := range []string{"memory", "cpu", "cpuacct", "pids", "blkio"} {
		dir := filepath.Join(top, c)
		if c == "cpuacct" {
			dir = h.v1["cpu"] // mounted together
		}
		h.v1[c] = dir
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func put(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCreate(t *testing.T) {
	h := fakeV1(t)
	g, err := h.create("/demo/a", "pod1")
	if err != nil {
		t.Fatal(err)
	}
	procs := g.Procs()
	if len(procs) != 4 || procs[0] != filepath.Join(h.v1["memory"], "demo/a/pod1/cgroup.procs") {
		t.Errorf("got %q", procs)
	}
	for _, p := range procs {
		if info, err := os.Stat(filepath.Dir(p)); err != nil || !info.IsDir() {
			t.Errorf("%s: %v", p, err)
		}
	}
	if g.Path() != "/demo/a/pod1" {
		t.Errorf("path %s", g.Path())
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Errorf("second Delete: %v", err)
	}
	if _, err := os.Stat(filepath.Join(h.v1["memory"], "demo/a/pod1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the leaf: %v", err)
	}
}

func TestFind(t *testing.T) {
	h := fakeV1(t)
	want, err := h.create("/kubepods/burstable/podx", "pod1")
	if err != nil {
		t.Fatal(err)
	}
	got, err := h.find("pod1")
	if err != nil {
		t.Fatal(err)
	}
	if got.Path() != want.Path() {
		t.Errorf("found %s, want %s", got.Path(), want.Path())
	}
	if _, err := h.find("pod2"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a leaf that is not there: %v", err)
	}
}

func TestCreateRefuses(t *testing.T) {
	h := fakeV1(t)
	for _, name := range []string{"", ".", "..", "a/b", "-a", strings.Repeat("a", 129)} {
		if _, err := h.create("", name); err == nil {
			t.Errorf("made %q", name)
		}
	}
	if _, err := h.create("/../x", "pod"); err == nil {
		t.Error("made a leaf outside")
	}
	// Somebody lives in it.
	for _, r := range h.roots() {
		dir := filepath.Join(r, "kuasar-vmm", "taken")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		put(t, dir, map[string]string{"cgroup.procs": "42\n"})
	}
	if _, err := h.create("", "taken"); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "42") {
		t.Errorf("got %v", err)
	}
	// One hierarchy of several fails: the others must not keep the leaf.
	if err := os.RemoveAll(h.v1["blkio"]); err != nil {
		t.Fatal(err)
	}
	if _, err := h.create("", "half"); err == nil {
		t.Error("made a leaf in a hierarchy that is gone")
	}
	if _, err := os.Stat(filepath.Join(h.v1["memory"], "kuasar-vmm", "half")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

func TestMetricsV1(t *testing.T) {
	h := fakeV1(t)
	g, err := h.create("", "pod1")
	if err != nil {
		t.Fatal(err)
	}
	put(t, g.dir(h.v1["memory"]), map[string]string{
		"memory.usage_in_bytes": "1000\n", "memory.limit_in_bytes": "9223372036854771712\n",
		"memory.max_usage_in_bytes": "2000\n", "memory.failcnt": "3\n",
		"memory.stat":        "rss 1\ncache 2\ntotal_rss 500\ntotal_inactive_file 200\ntotal_pgmajfault 7\nnew_key 1\nbroken\n",
		"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
	})
	put(t, g.dir(h.v1["cpu"]), map[string]string{
		"cpuacct.usage": "123456789\n", "cpuacct.stat": "user 10\nsystem 5\n",
		"cpu.stat": "nr_periods 1\nnr_throttled 2\nthrottled_time 3\n",
	})
	put(t, g.dir(h.v1["pids"]), map[string]string{"pids.current": "4\n", "pids.max": "max\n"})
	put(t, g.dir(h.v1["blkio"]), map[string]string{"blkio.throttle.io_service_bytes_recursive": "254:0 Read 4096\n254:0 Write 1\nTotal 4097\n"})
	got, err := g.Metrics()
	if err != nil {
		t.Fatal(err)
	}
	want := &cgroup1.Metrics{
		Pids: &cgroup1.PidsStat{Current: 4},
		CPU: &cgroup1.CPUStat{
			Usage:      &cgroup1.CPUUsage{Total: 123456789, User: 100_000_000, Kernel: 50_000_000},
			Throttling: &cgroup1.Throttle{Periods: 1, ThrottledPeriods: 2, ThrottledTime: 3},
		},
		Memory: &cgroup1.MemoryStat{
			RSS: 1, Cache: 2, TotalRSS: 500, TotalInactiveFile: 200, TotalPgMajFault: 7,
			Usage: &cgroup1.MemoryEntry{Usage: 1000, Limit: 9223372036854771712, Max: 2000, Failcnt: 3},
			Swap:  &cgroup1.MemoryEntry{},
		},
		MemoryOomControl: &cgroup1.MemoryOomControl{OomKill: 2},
		Blkio: &cgroup1.BlkIOStat{IoServiceBytesRecursive: []*cgroup1.BlkIOEntry{
			{Op: "Read", Major: 254, Value: 4096}, {Op: "Write", Major: 254, Value: 1},
		}},
	}
	if !proto.Equal(got, want) {
		t.Errorf("got\n%v\nwant\n%v", got, want)
	}
}

func TestMetricsV2(t *testing.T) {
	h := &host{v2: t.TempDir()}
	g, err := h.create("/p", "pod1")
	if err != nil {
		t.Fatal(err)
	}
	put(t, g.dir(h.v2), map[string]string{
		"memory.current": "1000\n", "memory.max": "max\n", "memory.peak": "1500\n", "memory.swap.max": "0\n",
		"memory.stat":   "anon 500\nfile 300\ninactive_file 200\nslab 9\npgmajfault 7\n",
		"memory.events": "low 0\nhigh 0\nmax 1\noom 2\noom_kill 3\noom_group_kill 0\n",
		"cpu.stat":      "usage_usec 12\nuser_usec 8\nsystem_usec 4\nnr_periods 1\nnr_throttled 2\nthrottled_usec 3\n",
		"pids.current":  "4\n", "pids.max": "100\n",
		"io.stat": "254:0 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=0 dios=0\n\nbad\n",
	})
	got, err := g.Metrics()
	if err != nil {
		t.Fatal(err)
	}
	want := &cgroup2.Metrics{
		Pids:         &cgroup2.PidsStat{Current: 4, Limit: 100},
		CPU:          &cgroup2.CPUStat{UsageUsec: 12, UserUsec: 8, SystemUsec: 4, NrPeriods: 1, NrThrottled: 2, ThrottledUsec: 3},
		Memory:       &cgroup2.MemoryStat{Anon: 500, File: 300, InactiveFile: 200, Slab: 9, Pgmajfault: 7, Usage: 1000, UsageLimit: math.MaxUint64, MaxUsage: 1500},
		MemoryEvents: &cgroup2.MemoryEvents{Max: 1, Oom: 2, OomKill: 3},
		Io:           &cgroup2.IOStat{Usage: []*cgroup2.IOEntry{{Major: 254, Rbytes: 4096, Wbytes: 1, Rios: 2, Wios: 3}}},
	}
	if !proto.Equal(got, want) {
		t.Errorf("got\n%v\nwant\n%v", got, want)
	}
}

func TestMetricsOfWhatIsGone(t *testing.T) {
	h := &host{v2: t.TempDir()}
	g, err := h.group("", "pod1")
	if err != nil {
		t.Fatal(err)
	}
	if m, err := g.Metrics(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, %v", m, err)
	}
}

// realGroup makes a leaf on this host.
func realGroup(t *testing.T, parent, name string) *Group {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make cgroups")
	}
	g, err := New(parent, name)
	if err != nil {
		t.Skipf("cannot make cgroups here: %v", err)
	}
	t.Cleanup(func() { g.Delete(t.Context()) })
	return g
}

func TestRealGroup(t *testing.T) {
	parent := "/kuasar-test-" + strconv.Itoa(os.Getpid()) + "/a"
	g := realGroup(t, parent, "pod1")
	other := realGroup(t, parent, "pod2")
	// Two generations of processes, which ignore every signal but one.
	cmd := exec.Command("/bin/sh", "-c", "trap '' TERM INT HUP; read line; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 600 & echo; wait; sleep 600")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, p := range g.Procs() {
		if err := os.WriteFile(p, []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	in.Write([]byte("\n"))
	out.Read(make([]byte, 1))
	pids, err := g.PIDs()
	if err != nil || len(pids) != 2 || !slices.Contains(pids, cmd.Process.Pid) {
		t.Errorf("got %v, %v; want two, %d among them", pids, err, cmd.Process.Pid)
	}
	m, err := g.Metrics()
	if err != nil {
		t.Fatal(err)
	}
	var cpu uint64
	switch m := m.(type) {
	case *cgroup1.Metrics:
		cpu = m.CPU.Usage.Total
	case *cgroup2.Metrics:
		cpu = m.CPU.UsageUsec
	}
	if cpu == 0 {
		t.Errorf("no time of the processor was counted: %v", m)
	}
	if _, err := New(parent, "pod1"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second group of that name: %v", err)
	}

	again, err := Load(parent, "pod1")
	if err != nil {
		t.Fatal(err)
	}
	go cmd.Wait() // reaped as the daemon does
	if err := again.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(parent, "pod1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Delete: %v", err)
	}
	if _, err := g.Metrics(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("metrics after Delete: %v", err)
	}
	// The parents stay for the other pod, and go with it.
	if err := other.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, r := range other.host.roots() {
		if _, err := os.Stat(filepath.Join(r, filepath.Dir(parent))); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s in %s is left: %v", filepath.Dir(parent), r, err)
		}
	}
}

func TestForeignParentStays(t *testing.T) {
	g := realGroup(t, "/kuasar-test-foreign-"+strconv.Itoa(os.Getpid()), "probe")
	root := g.host.roots()[0]
	if err := g.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	name := "kuasar-test-mine-" + strconv.Itoa(os.Getpid())
	dir := filepath.Join(root, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	g, err := New("/"+name, "pod1")
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("removed what it had not made: %v", err)
	}
}

func BenchmarkMetrics(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root to make cgroups")
	}
	g, err := New("/kuasar-bench", "pod1")
	if err != nil {
		b.Skip(err)
	}
	defer g.Delete(b.Context())
	b.ReportAllocs()
	for b.Loop() {
		if _, err := g.Metrics(); err != nil {
			b.Fatal(err)
		}
	}
}
