// Package namespaces makes the namespaces that all containers of the pod share, and keeps them
// while no container is there: they are bound to files under protocol.NamespaceDir, which the
// specs of containers name.
package namespaces

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

// PauseArg is the first argument with which the agent's binary becomes the process that keeps the
// shared pid namespace. main must call Pause when it finds it.
const PauseArg = "pause"

// Pod are the shared namespaces of the pod.
type Pod struct {
	dir   string
	bound []string
	pause *exec.Cmd
}

// Setup makes the ipc and uts namespaces, the latter with hostname, and with sharedPID the pid
// namespace with a pause process as its init. It is called once per guest. After an error nothing
// is left.
func Setup(sharedPID bool, hostname string) (*Pod, error) {
	return SetupIn(protocol.NamespaceDir, sharedPID, hostname)
}

// SetupIn is Setup with another directory than protocol.NamespaceDir.
func SetupIn(dir string, sharedPID bool, hostname string) (_ *Pod, err error) {
	p := &Pod{dir: dir}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	// Containers' processes of any user may look at a namespace by its path, but not list them.
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("cannot make namespaces of the pod: %w", err)
	}
	if err := p.unshare(hostname); err != nil {
		return nil, fmt.Errorf("cannot make namespaces of the pod: %w", err)
	}
	if sharedPID {
		if err := p.startPause(); err != nil {
			return nil, fmt.Errorf("cannot make shared pid namespace of the pod: %w", err)
		}
	}
	return p, nil
}

// unshare makes the ipc and uts namespaces in a thread that ends afterwards.
func (p *Pod) unshare(hostname string) error {
	result := make(chan error, 1)
	go inOwnThread(func() {
		result <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
				return os.NewSyscallError("unshare", err)
			}
			if hostname != "" {
				if err := unix.Sethostname([]byte(hostname)); err != nil {
					return fmt.Errorf("cannot set hostname %q: %w", hostname, err)
				}
			}
			for _, kind := range []string{"ipc", "uts"} {
				if err := p.bind("/proc/thread-self/ns/"+kind, kind); err != nil {
					return err
				}
			}
			return nil
		}()
	})
	return <-result
}

// inOwnThread runs f in a thread that is not used for anything else afterwards. The first thread
// of the process cannot end, and would show the namespaces in /proc/<pid>, so it is avoided.
func inOwnThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// While this goroutine holds the first thread, another one runs elsewhere.
		done := make(chan struct{})
		go func() {
			defer close(done)
			inOwnThread(f)
		}()
		<-done
		runtime.UnlockOSThread()
		return
	}
	// No UnlockOSThread: the thread ends with the goroutine.
	f()
}

// startPause makes the pid namespace.
func (p *Pod) startPause() error {
	pause := exec.Command("/proc/self/exe", PauseArg)
	pause.Args[0] = "pause"
	pause.Env = []string{}
	pause.Dir = "/"
	pause.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	if err := pause.Start(); err != nil {
		return fmt.Errorf("cannot start pause process: %w", err)
	}
	p.pause = pause
	return p.bind(fmt.Sprintf("/proc/%d/ns/pid", pause.Process.Pid), "pid")
}

// bind keeps a namespace by mounting it on a file.
func (p *Pod) bind(ns, kind string) error {
	path := filepath.Join(p.dir, kind)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("cannot keep %s namespace: %w", kind, err)
	}
	f.Close()
	if err := unix.Mount(ns, path, "", unix.MS_BIND, ""); err != nil {
		os.Remove(path)
		return fmt.Errorf("cannot keep %s namespace: cannot mount %s on %s: %w", kind, ns, path, err)
	}
	p.bound = append(p.bound, path)
	return nil
}

// PausePID is the number of the pause process in the guest, 0 without a shared pid namespace.
func (p *Pod) PausePID() int {
	if p.pause == nil {
		return 0
	}
	return p.pause.Process.Pid
}

// Close ends the pause process, and with it everything in the shared pid namespace, and lets go
// of the namespaces. It may be called again.
func (p *Pod) Close() error {
	var errs []error
	if p.pause != nil {
		p.pause.Process.Kill()
		p.pause.Wait()
		p.pause = nil
	}
	for _, path := range p.bound {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("cannot let go of namespace %s: %w", path, err))
			continue
		}
		os.Remove(path)
	}
	p.bound = nil
	return errors.Join(errs...)
}
