// Package census counts what a node consists of: mounts, network namespaces, links, cgroups,
// processes, files, and the descriptors of its daemons. A test that leaves something behind is
// found by the difference between the census before it and the one after it.
package census

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Scope is what belongs to the node. Everything else on the machine is not looked at.
type Scope struct {
	// Dirs are the directories of the node; files, sockets and mounts below them count.
	Dirs []string
	// Mounts is a directory below which mounts count, files not.
	Mounts string
	// Bridge is the bridge whose ports count.
	Bridge string
	// CgroupParents are cgroups, in every hierarchy, whose descendants count.
	CgroupParents []string
	// Metrics is a socket that yields the counters of a daemon, of which that of its goroutines
	// counts.
	Metrics string
	// Daemons are processes whose open descriptors count, by name.
	Daemons map[string]int
}

// Census says how many there are of each thing.
type Census map[string]int

// Adopt makes orphaned descendants of this process its children, so that Take finds the machines
// of a daemon that has died.
func Adopt() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot adopt orphaned processes: %w", err)
	}
	return nil
}

// Take counts.
func Take(scope Scope) (Census, error) {
	c := Census{}
	return c, errors.Join(
		c.mounts(scope),
		c.links(scope.Bridge),
		c.cgroups(scope.CgroupParents),
		c.processes(),
		c.files(scope.Dirs),
		c.descriptors(scope.Daemons),
		c.goroutines(scope.Metrics),
	)
}

// goroutines is their key in a Census.
const goroutines = "goroutine"

// Difference lists what after has more or less of than before; to have fewer goroutines is no difference.
func Difference(before, after Census) []string {
	var lines []string
	for _, thing := range slices.Sorted(maps.Keys(after)) {
		if more := after[thing] - before[thing]; more > 0 {
			lines = append(lines, fmt.Sprintf("left behind: %s (%d more)", thing, more))
		}
	}
	for _, thing := range slices.Sorted(maps.Keys(before)) {
		// What an earlier test had begun may end at any time.
		if less := before[thing] - after[thing]; less > 0 && thing != goroutines {
			lines = append(lines, fmt.Sprintf("missing: %s (%d less)", thing, less))
		}
	}
	return lines
}

// Settle takes the census until it equals before or ctx ends: some things end after the call that
// ends them has returned. It returns the last difference.
func Settle(ctx context.Context, scope Scope, before Census) ([]string, error) {
	for {
		after, err := Take(scope)
		if err != nil {
			return nil, err
		}
		difference := Difference(before, after)
		if len(difference) == 0 {
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return difference, nil
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// mounts counts in this process's mount namespace and in those of the daemons.
func (c Census) mounts(scope Scope) error {
	namespaces := map[string]string{"": "/proc/self/mountinfo"}
	for name, pid := range scope.Daemons {
		namespaces[" in the mount namespace of "+name] = fmt.Sprintf("/proc/%d/mountinfo", pid)
	}
	for where, path := range namespaces {
		table, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("cannot count mounts: %w", err)
		}
		for line := range strings.Lines(string(table)) {
			fields := strings.Fields(line)
			dash := slices.Index(fields, "-")
			if dash < 5 || len(fields) < dash+3 {
				continue
			}
			if point := fields[4]; below(point, scope.Mounts) {
				c[fmt.Sprintf("mount %s of type %s%s", shortened(point), fields[dash+1], where)]++
			}
		}
	}
	return nil
}

// links counts the ports of a bridge.
func (c Census) links(bridge string) error {
	ports, err := os.ReadDir(filepath.Join("/sys/class/net", bridge, "brif"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot count links: %w", err)
	}
	for range ports {
		c["port of the bridge "+bridge]++
	}
	return nil
}

// cgroups counts the descendants of the parents in every mounted hierarchy.
func (c Census) cgroups(parents []string) error {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("cannot count cgroups: %w", err)
	}
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) < 5 || !strings.Contains(line, " - cgroup") {
			continue
		}
		for _, parent := range parents {
			top := filepath.Join(fields[4], parent)
			err := filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
				if err != nil {
					if errors.Is(err, fs.ErrNotExist) {
						return nil // it ended while it was being looked at
					}
					return err
				}
				if entry.IsDir() && path != top {
					c["cgroup "+path]++
				}
				return nil
			})
			if err != nil {
				return fmt.Errorf("cannot count cgroups: %w", err)
			}
		}
	}
	return nil
}

// zombies are those of the last look, by process id.
var zombies = map[int]bool{}

// processes counts the descendants of this process and the network namespaces they are in.
func (c Census) processes() error {
	type process struct {
		parent int
		name   string
		zombie bool
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("cannot count processes: %w", err)
	}
	all := map[int]process{}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "stat"))
		if err != nil {
			continue // it has ended
		}
		open, close := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
		fields := strings.Fields(string(stat[close+1:]))
		parent, err := strconv.Atoi(fields[1])
		if err != nil {
			return fmt.Errorf("cannot count processes: /proc/%d/stat: %w", pid, err)
		}
		all[pid] = process{parent, string(stat[open+1 : close]), fields[0] == "Z"}
	}
	self := os.Getpid()
	ours, _ := os.Readlink("/proc/self/ns/net")
	seen := map[int]bool{}
	for pid, p := range all {
		descends := false
		for at := pid; at > 1 && !descends; at = all[at].parent {
			descends = all[at].parent == self
		}
		if !descends {
			continue
		}
		if p.zombie && p.parent == self {
			// An adopted orphan has nobody else to wait for it. A child that os/exec started is a
			// zombie only for the moment until its Wait returns, so it is not seen twice.
			if seen[pid] = true; zombies[pid] {
				var status unix.WaitStatus
				unix.Wait4(pid, &status, unix.WNOHANG, nil)
			}
			continue
		}
		c["process "+p.name]++
		if namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil && namespace != ours {
			c["network namespace of the process "+p.name]++
		}
	}
	zombies = seen
	return nil
}

// files counts what is below the directories: files, sockets, FIFOs, directories.
func (c Census) files(dirs []string) error {
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				return err
			}
			if path != dir {
				c[fmt.Sprintf("file %s (%s)", shortened(path), entry.Type())]++
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("cannot count files: %w", err)
		}
	}
	return nil
}

// descriptors counts the open descriptors of the daemons, by what they are open on.
func (c Census) descriptors(daemons map[string]int) error {
	for name, pid := range daemons {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		entries, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("cannot count the descriptors of %s: %w", name, err)
		}
		for _, entry := range entries {
			target, err := os.Readlink(filepath.Join(dir, entry.Name()))
			if err != nil {
				continue // closed meanwhile
			}
			c[fmt.Sprintf("descriptor of %s on %s", name, inode.ReplaceAllString(shortened(target), ""))]++
		}
	}
	return nil
}

// goroutines reads how many of them a daemon has.
func (c Census) goroutines(socket string) error {
	if socket == "" {
		return nil
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return fmt.Errorf("cannot count goroutines: %w", err)
	}
	defer conn.Close()
	text, err := io.ReadAll(conn)
	if err != nil {
		return fmt.Errorf("cannot count goroutines: %w", err)
	}
	match := regexp.MustCompile(`(?m)^go_goroutines (\d+)$`).FindSubmatch(text)
	if match == nil {
		return fmt.Errorf("cannot count goroutines: %s does not tell them", socket)
	}
	c[goroutines], err = strconv.Atoi(string(match[1]))
	return err
}

var (
	inode = regexp.MustCompile(`:\[\d+\]$`)
	// ids are those of pods and containers, and the random parts of the names of their files.
	ids = regexp.MustCompile(`[0-9a-f]{64}`)
)

// shortened shortens the ids in a path, as people write them.
func shortened(path string) string {
	return ids.ReplaceAllStringFunc(path, func(id string) string { return id[:13] })
}

func below(path, dir string) bool {
	return dir != "" && (path == dir || strings.HasPrefix(path, dir+"/"))
}
