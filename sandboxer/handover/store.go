package handover

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Store keeps open files beyond the life of this process, in the service manager's file descriptor
// store (sd_notify(3), FDSTORE=1). A restart, orderly or not, hands them to the next daemon; a stop
// drops them. The methods may be called from several goroutines; a nil Store keeps nothing.
//
// The service manager hands all names over in one environment variable, which the kernel limits to
// 128 KiB. So what it sees are short numbers; what they stand for is in a table, which it keeps, too.
type Store struct {
	address string
	log     *slog.Logger

	mu    sync.Mutex
	left  map[string]*os.File // by another daemon, not yet taken
	kept  map[string]string   // what the service manager calls it
	table *table              // nil while nothing is kept
	last  uint64              // number that was given
}

// Open takes what an earlier daemon of this service has left, and removes the variables that
// announce it from the environment. It is called once, early.
func Open(log *slog.Logger) *Store {
	address := os.Getenv("NOTIFY_SOCKET")
	// Newer service managers say how much they keep.
	if os.Getenv("FDSTORE") == "0" {
		address = ""
	}
	return New(address, activation.Files(true), log)
}

// New returns the Store of the service manager that listens on the given Unix datagram socket, none
// if that is empty, and has passed the given files, which the Store owns from now on.
func New(address string, left []*os.File, log *slog.Logger) *Store {
	s := &Store{address: address, log: log, left: map[string]*os.File{}, kept: map[string]string{}}
	names := s.takeTable(left)
	for _, f := range left {
		if isTable(f.Name()) {
			continue
		}
		name, known := names[f.Name()]
		if other := s.left[name]; !known || other != nil {
			// It is somebody else's, or what a lost removal has left behind.
			log.Warn("a descriptor that the service manager passed is not used", "name", f.Name())
			s.drop(f)
			continue
		}
		s.left[name] = f
		s.kept[name] = f.Name()
	}
	return s
}

// takeTable finds the table among what was left, and closes those that it has replaced.
func (s *Store) takeTable(left []*os.File) (names map[string]string) {
	for _, f := range left {
		if !isTable(f.Name()) {
			continue
		}
		t, err := openTable(f)
		if err != nil {
			s.log.Error("what an earlier daemon has left is not used", "error", err)
			s.drop(f)
			continue
		}
		old := t
		if s.table == nil || t.generation > s.table.generation {
			s.table, old = t, s.table
		}
		if old != nil {
			s.drop(old.file)
		}
	}
	if s.table == nil {
		return nil
	}
	s.last = s.table.last
	return s.table.names()
}

// Lasting tells whether there is a service manager to keep anything. If not, Put does nothing.
func (s *Store) Lasting() bool { return s != nil && s.address != "" }

// checkName refuses what systemd would, and what no owner here uses.
func checkName(name string) error {
	if name == "" || len(name) > 255 {
		return fmt.Errorf("a descriptor's name of %d bytes cannot be kept: allowed are 1 to 255", len(name))
	}
	if i := strings.IndexFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._/-", r))
	}); i >= 0 {
		return fmt.Errorf("a descriptor cannot be kept under the name %q: only letters, digits and ._/- are allowed", name)
	}
	return nil
}

// Put keeps f, which stays the caller's to close, under a name that is not in use.
func (s *Store) Put(name string, f *os.File) error {
	if !s.Lasting() {
		return nil
	}
	if err := checkName(name); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.kept[name]; ok {
		return fmt.Errorf("a descriptor is kept as %s already", name)
	}
	// First what it stands for, then the descriptor: nobody ever finds one that stands for nothing.
	number, err := s.enter(name)
	if err == nil {
		err = s.send(number, f)
	}
	if err != nil {
		return fmt.Errorf("cannot give the descriptor %s to the service manager: %w", name, err)
	}
	s.kept[name] = number
	return nil
}

// enter adds a name to the table. s.mu is held.
func (s *Store) enter(name string) (number string, err error) {
	if s.table == nil || s.table.size > tableSize && s.table.size > 256*int64(len(s.kept)) {
		if err := s.renewTable(); err != nil {
			return "", err
		}
	}
	s.last++
	number = strconv.FormatUint(s.last, 36)
	return number, s.table.add(number, name)
}

// renewTable replaces the table by one without what is kept no more.
func (s *Store) renewTable() error {
	generation := uint64(0)
	if s.table != nil {
		generation = s.table.generation + 1
	}
	t, err := newTable(generation)
	if err != nil {
		return err
	}
	for name, number := range s.kept {
		if err := t.add(number, name); err != nil {
			t.file.Close()
			return err
		}
	}
	if err := s.send(t.file.Name(), t.file); err != nil {
		t.file.Close()
		return err
	}
	if s.table != nil {
		s.drop(s.table.file)
	}
	s.table = t
	return nil
}

// drop closes a file and has the service manager forget it, by the name that it has there.
func (s *Store) drop(f *os.File) {
	f.Close()
	s.forget(f.Name())
}

func (s *Store) forget(number string) {
	if s.address == "" {
		return
	}
	if err := s.notify("FDSTOREREMOVE=1\nFDNAME="+number, nil); err != nil {
		s.log.Warn("the service manager keeps a descriptor longer than needed", "name", number, "error", err)
	}
}

// PutAll keeps several files under names that begin with prefix, or none of them.
func (s *Store) PutAll(prefix string, files map[string]*os.File) error {
	var done []string
	for suffix, f := range files {
		if err := s.Put(prefix+suffix, f); err != nil {
			s.Remove(done...)
			return err
		}
		done = append(done, prefix+suffix)
	}
	return nil
}

// send has the service manager keep a file under a number, or a table's name.
func (s *Store) send(number string, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	// The manager must not drop a connection whose client has left: what it sent before counts.
	sent := error(nil)
	err = raw.Control(func(fd uintptr) { sent = s.notify("FDSTORE=1\nFDPOLL=0\nFDNAME="+number, unix.UnixRights(int(fd))) })
	if err != nil {
		return err
	}
	return sent
}

// notify passes a message on. The library's helpers cannot send descriptors.
func (s *Store) notify(message string, rights []byte) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendmsg(fd, []byte(message), rights, &unix.SockaddrUnix{Name: s.address}, unix.MSG_NOSIGNAL)
}

// Remove forgets what is kept under the given names. Names that are not in use are ignored.
func (s *Store) Remove(names ...string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		if f := s.left[name]; f != nil {
			f.Close()
			delete(s.left, name)
		}
		number, ok := s.kept[name]
		if !ok {
			continue
		}
		delete(s.kept, name)
		s.forget(number)
	}
	if len(s.kept) == 0 && s.table != nil {
		s.drop(s.table.file)
		s.table = nil
	}
}

// RemoveAll forgets everything whose name begins with prefix.
func (s *Store) RemoveAll(prefix string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	var names []string
	for name := range s.kept {
		if strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	s.mu.Unlock()
	s.Remove(names...)
}

// Take returns what an earlier daemon has left under the name, which the caller closes, or nil. It
// stays kept until Remove. A second Take of the same name returns nil.
func (s *Store) Take(name string) *os.File {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.left[name]
	delete(s.left, name)
	return f
}

// Names lists, sorted, what an earlier daemon has left under names that begin with prefix, and
// nobody has taken.
func (s *Store) Names(prefix string) []string {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for name := range s.left {
		if strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Sweep forgets what an earlier daemon has left and nobody has taken, but for what keep wants: the
// owners are gone. It is called after the recovery.
func (s *Store) Sweep(keep func(name string) bool) {
	names := slices.DeleteFunc(s.Names(""), keep)
	if len(names) == 0 {
		return
	}
	s.log.Info("descriptors of what is gone are dropped", "count", len(names))
	s.Remove(names...)
}
