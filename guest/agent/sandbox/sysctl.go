package sandbox

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

// sysctlPath is the file of a setting. As for sysctl(8), whichever of '.' and '/' comes first
// separates; the other one then stands for itself, as in net/ipv4/conf/eth0.100/forwarding.
func sysctlPath(name string) (string, error) {
	bad := func() (string, error) { return "", fmt.Errorf("%.300q is no name of a sysctl", name) }
	first := strings.IndexAny(name, "./")
	if len(name) > 256 || first < 0 {
		return bad()
	}
	path := name
	if name[first] == '.' {
		path = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	for part := range strings.SplitSeq(path, "/") {
		if part == "" || part == "." || part == ".." {
			return bad()
		}
		for _, c := range []byte(part) {
			if c <= ' ' || c >= 0x7f {
				return bad()
			}
		}
	}
	return "/proc/sys/" + path, nil
}

// podSysctl tells the settings that belong to the ipc and uts namespaces, which the pod has of its
// own.
func podSysctl(path string) bool {
	name := strings.TrimPrefix(path, "/proc/sys/")
	for _, prefix := range []string{"kernel/msg", "kernel/sem", "kernel/shm", "fs/mqueue/", "kernel/hostname", "kernel/domainname"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

func globalSysctl(path string) bool { return !podSysctl(path) }

func writeSysctl(path, value string) error { return os.WriteFile(path, []byte(value), 0) }

// setSysctls writes those settings that apply selects, in order of their names. It returns those
// that are left: not selected, or not there (yet).
func setSysctls(settings map[string]string, apply func(path string) bool, write func(path, value string) error) (map[string]string, error) {
	left := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		path, err := sysctlPath(name)
		if err != nil {
			return nil, err
		}
		if !apply(path) {
			left[name] = settings[name]
			continue
		}
		err = write(path, settings[name])
		if errors.Is(err, os.ErrNotExist) {
			left[name] = settings[name]
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot set sysctl %s to %q: %w", name, settings[name], err)
		}
	}
	return left, nil
}

// setPodSysctls writes what is left after the global settings. What is not there by now never
// will be.
func setPodSysctls(settings map[string]string) error {
	if len(settings) == 0 {
		return nil
	}
	var left map[string]string
	err := inPodNamespaces(func() (err error) {
		left, err = setSysctls(settings, podSysctl, writeSysctl)
		return err
	})
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(left)) {
		return fmt.Errorf("cannot set sysctl %s: the guest's kernel does not have it", name)
	}
	return nil
}

// inPodNamespaces runs f in a thread that has entered the pod's ipc and uts namespaces: the files
// under /proc/sys show the settings of whoever opens them.
func inPodNamespaces(f func() error) error {
	result := make(chan error, 1)
	go func() {
		// The thread is not given back: it ends with this goroutine. The first thread of the
		// process cannot end, and it shows the agent's namespaces to everyone, so it goes back.
		runtime.LockOSThread()
		result <- func() error {
			var back []*os.File
			defer func() {
				for _, ns := range back {
					if err := unix.Setns(int(ns.Fd()), 0); err == nil {
						ns.Close()
					}
				}
			}()
			for _, kind := range []string{"ipc", "uts"} {
				own, err := os.Open("/proc/thread-self/ns/" + kind)
				if err != nil {
					return fmt.Errorf("cannot set sysctls of the pod: %w", err)
				}
				back = append(back, own)
				pod, err := os.Open(protocol.NamespaceDir + "/" + kind)
				if err != nil {
					return fmt.Errorf("cannot set sysctls of the pod: %w", err)
				}
				err = unix.Setns(int(pod.Fd()), 0)
				pod.Close()
				if err != nil {
					return fmt.Errorf("cannot enter the pod's %s namespace: %w", kind, err)
				}
			}
			return f()
		}()
	}()
	return <-result
}
