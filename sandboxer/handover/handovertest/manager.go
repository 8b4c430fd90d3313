// Package handovertest stands in for the service manager's file descriptor store, so that tests can
// kill daemons and start them again without systemd.
package handovertest

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/handover"
)

// Manager keeps descriptors for one service, as systemd does.
type Manager struct {
	dir  string
	conn *net.UnixConn

	mu     sync.Mutex
	files  map[string]*os.File
	states []string // everything that is not about descriptors, in order
	done   chan struct{}
	err    error
}

// NewManager starts to listen. Close ends that and drops everything.
func NewManager() (*Manager, error) {
	dir, err := os.MkdirTemp("", "sd")
	if err != nil {
		return nil, err
	}
	address := &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"}
	conn, err := net.ListenUnixgram("unixgram", address)
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	m := &Manager{dir: dir, conn: conn, files: map[string]*os.File{}, done: make(chan struct{})}
	go m.serve()
	return m, nil
}

// Address is what the service finds in NOTIFY_SOCKET.
func (m *Manager) Address() string { return m.conn.LocalAddr().String() }

// Close drops all descriptors. Its error is what a service has done wrong.
func (m *Manager) Close() error {
	m.conn.Close()
	<-m.done
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.files {
		f.Close()
	}
	return errors.Join(m.err, os.RemoveAll(m.dir))
}

func (m *Manager) serve() {
	defer close(m.done)
	text, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*16))
	for {
		n, r, _, _, err := m.conn.ReadMsgUnix(text, rights)
		if err != nil {
			return
		}
		m.mu.Lock()
		if err := m.handle(string(text[:n]), rights[:r]); err != nil {
			m.err = errors.Join(m.err, err)
		}
		m.mu.Unlock()
	}
}

func (m *Manager) handle(text string, rights []byte) error {
	var fds []int
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return err
	}
	for _, message := range messages {
		got, err := unix.ParseUnixRights(&message)
		if err != nil {
			return err
		}
		fds = append(fds, got...)
	}
	values := map[string]string{}
	for line := range strings.SplitSeq(text, "\n") {
		key, value, _ := strings.Cut(line, "=")
		values[key] = value
	}
	name := values["FDNAME"]
	switch {
	case values["BARRIER"] == "1" && len(fds) == 1:
		return unix.Close(fds[0])
	case values["FDSTOREREMOVE"] == "1":
		if f := m.files[name]; f != nil {
			f.Close()
			delete(m.files, name)
		}
		return nil
	case values["FDSTORE"] == "1":
		for _, fd := range fds {
			if m.files[name] != nil {
				unix.Close(fd)
				return fmt.Errorf("a second descriptor came under the name %s", name)
			}
			m.files[name] = os.NewFile(uintptr(fd), name)
		}
		return nil
	}
	m.states = append(m.states, text)
	return nil
}

// Sync returns when everything that was sent before has been handled.
func (m *Manager) Sync() error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		write.Close()
		return err
	}
	defer unix.Close(fd)
	err = unix.Sendmsg(fd, []byte("BARRIER=1"), unix.UnixRights(int(write.Fd())), &unix.SockaddrUnix{Name: m.Address()}, 0)
	write.Close()
	if err != nil {
		return err
	}
	// The end of the pipe says that the last copy of its other end was closed.
	_, _ = read.Read(make([]byte, 1))
	return nil
}

// Names are those under which the service keeps something, sorted.
func (m *Manager) Names() []string {
	files, _, err := m.copies()
	if err != nil {
		return []string{err.Error()}
	}
	s := handover.New("", files, slog.New(slog.DiscardHandler))
	names := s.Names("")
	s.RemoveAll("")
	return names
}

// States are the other messages of the service, such as READY=1, in order.
func (m *Manager) States() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.states)
}

// Store is what the next daemon would open, for tests in which daemons are not processes.
func (m *Manager) Store(log *slog.Logger) (*handover.Store, error) {
	if err := m.Sync(); err != nil {
		return nil, err
	}
	files, _, err := m.copies()
	if err != nil {
		return nil, err
	}
	return handover.New(m.Address(), files, log), nil
}

// copies duplicates what is kept: what is kept stays kept.
func (m *Manager) copies() (files []*os.File, names []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, f := range m.files {
		raw, err := f.SyscallConn()
		if err != nil {
			return nil, nil, err
		}
		copied := -1
		if cerr := raw.Control(func(fd uintptr) { copied, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil || err != nil {
			return nil, nil, errors.Join(cerr, err)
		}
		files = append(files, os.NewFile(uintptr(copied), name))
		names = append(names, name)
	}
	return files, names, nil
}

// Start starts a daemon with what is kept. Its environment must be set already; ExtraFiles must be
// empty.
func (m *Manager) Start(cmd *exec.Cmd) error {
	if err := m.Sync(); err != nil {
		return err
	}
	files, names, err := m.copies()
	if err != nil {
		return err
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+m.Address())
	// Only the process itself knows the pid that it has to find there. Without files it is started in
	// the same way, so that what it inherits is the same.
	cmd.Env = append(cmd.Env, fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	cmd.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	if cmd.Path, err = exec.LookPath("sh"); err != nil {
		return err
	}
	cmd.ExtraFiles = files
	return cmd.Start()
}
