package containers

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// oomWatch reports kills for want of memory in one cgroup. The kernel counts them; a notification
// only says that the counter is worth reading, so a lost one loses nothing that check does not
// find when the process's exit is reported. A nil *oomWatch watches nothing.
type oomWatch struct {
	file   string // holds a line "oom_kill N"
	report func()
	events *os.File // readable when the file has changed

	mu   sync.Mutex
	seen uint64
}

// watchOOM watches a container. report is called once for each time that the counter is found
// higher.
func (g cgroup) watchOOM(report func()) (*oomWatch, error) {
	switch {
	case g.unified:
		return watchUnified(g.dir, report)
	case g.dir != "":
		return watchMemory(g.dir, report)
	}
	return nil, errors.New("the container has no memory cgroup")
}

// watchUnified is for cgroup v2, where a change of memory.events can be seen by inotify.
func watchUnified(dir string, report func()) (*oomWatch, error) {
	w := &oomWatch{file: filepath.Join(dir, "memory.events"), report: report}
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot watch %s: %w", w.file, err)
	}
	if _, err := unix.InotifyAddWatch(fd, w.file, unix.IN_MODIFY); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot watch %s: %w", w.file, err)
	}
	w.events = os.NewFile(uintptr(fd), "inotify")
	go w.run()
	return w, nil
}

// watchMemory is for cgroup v1, which writes to an eventfd.
func watchMemory(dir string, report func()) (*oomWatch, error) {
	w := &oomWatch{file: filepath.Join(dir, "memory.oom_control"), report: report}
	control, err := os.Open(w.file)
	if err != nil {
		return nil, fmt.Errorf("cannot watch for kills: %w", err)
	}
	defer control.Close()
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot watch %s: %w", w.file, err)
	}
	order := strconv.Itoa(fd) + " " + strconv.Itoa(int(control.Fd()))
	if err := os.WriteFile(filepath.Join(dir, "cgroup.event_control"), []byte(order), 0); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot watch %s: %w", w.file, err)
	}
	w.events = os.NewFile(uintptr(fd), "eventfd")
	go w.run()
	return w, nil
}

func (w *oomWatch) run() {
	buf := make([]byte, 256)
	for {
		if _, err := w.events.Read(buf); err != nil {
			return
		}
		w.check()
	}
}

// check reads the counter and reports if it has grown.
func (w *oomWatch) check() {
	if w == nil {
		return
	}
	b, err := os.ReadFile(w.file)
	if err != nil {
		return // the cgroup is gone
	}
	count := valueOf(b, "oom_kill")
	w.mu.Lock()
	grown := count > w.seen
	w.seen = max(w.seen, count)
	w.mu.Unlock()
	if grown {
		w.report()
	}
}

func (w *oomWatch) close() {
	if w != nil {
		w.events.Close()
	}
}

// valueOf finds the number behind a name in lines of the form "name number".
func valueOf(b []byte, name string) uint64 {
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		if rest, ok := bytes.CutPrefix(lines.Bytes(), []byte(name+" ")); ok {
			n, _ := strconv.ParseUint(string(bytes.TrimSpace(rest)), 10, 64)
			return n
		}
	}
	return 0
}
