package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/pod"
)

// listeners makes the listeners of the daemon's Unix sockets, or takes them over from an earlier
// daemon with the clients that wait on them.
//
// A listener is kept as listener/OWNER/INODE. The inode is that of the socket's file: only if the
// file is still the same do clients that connect to the path reach this listener.
type listeners struct {
	store *handover.Store
	log   *slog.Logger
}

func keptAs(owner string) string { return "listener/" + owner + "/" }

// kept returns the listener that an earlier daemon left for the owner's socket at path, or nil.
func (s listeners) kept(owner, socket string) net.Listener {
	inode := ""
	if info, err := os.Lstat(socket); err == nil && info.Mode()&fs.ModeSocket != 0 {
		inode = inodeOf(info)
	}
	for _, name := range s.store.Names(keptAs(owner)) {
		f := s.store.Take(name)
		if inode == "" || path.Base(name) != inode {
			s.log.Warn("a kept listener is not used: its socket was removed or replaced", "socket", socket)
			f.Close()
			s.store.Remove(name)
			continue
		}
		l, err := net.FileListener(f)
		f.Close()
		if err == nil && l.Addr().String() != socket {
			err = fmt.Errorf("it listens on %s", l.Addr())
			l.Close()
		}
		if err != nil {
			s.log.Warn("a kept listener is not used", "socket", socket, "error", err)
			s.store.Remove(name)
			continue
		}
		return l
	}
	return nil
}

// listen returns the owner's listener for path: the kept one, or what make makes, which is kept from
// now on.
func (s listeners) listen(owner, socket string, make func(path string) (net.Listener, error)) (net.Listener, error) {
	if l := s.kept(owner, socket); l != nil {
		return l, nil
	}
	l, err := make(socket)
	if err != nil {
		return nil, err
	}
	if err := s.keep(owner, socket, l); err != nil {
		s.log.Warn("clients cannot connect while the daemon restarts", "socket", socket, "error", err)
	}
	return l, nil
}

func (s listeners) keep(owner, socket string, l net.Listener) error {
	if !s.store.Lasting() {
		return nil
	}
	info, err := os.Lstat(socket)
	if err != nil {
		return err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return errors.New("it is no Unix socket")
	}
	f, err := u.File()
	if err != nil {
		return err
	}
	defer f.Close()
	return s.store.Put(keptAs(owner)+inodeOf(info), f)
}

func (s listeners) forget(owner string) { s.store.RemoveAll(keptAs(owner)) }

func inodeOf(info fs.FileInfo) string {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return strings.Join([]string{fmt.Sprint(st.Dev), fmt.Sprint(st.Ino)}, "-")
}

// belongsToPod tells whether a kept descriptor, whose name is KIND/POD/..., is that of a pod which
// still has a state directory in dir.
func belongsToPod(dir, name string) bool {
	parts := strings.SplitN(name, "/", 3)
	if len(parts) < 3 || pod.CheckID(parts[1]) != nil {
		return false
	}
	_, err := os.Lstat(filepath.Join(dir, parts[1]))
	return err == nil
}
