// Package initrd builds the guest's initrd: the agent as PID 1, the few files that it expects, and
// the debug console's tools in an archive that costs a guest only its compressed size until
// somebody opens the console.
//
// The initrd is not compressed: the guest would pay for unpacking it at every boot. It is a pure
// function of the files that go in, byte by byte.
package initrd

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
	"kuasar.io/kuasar/ci/cache"
	"kuasar.io/kuasar/guest/protocol"
)

// ConsoleArchive is where the archive of the console's tools is in the guest: a gzip-compressed
// newc cpio with bin/bb and a relative link to it for each command, the shell bin/sh among them.
const ConsoleArchive = "/usr/lib/kuasar/console.cpio.gz"

// Limit is the largest initrd, in bytes: every pod pays for it in memory.
const Limit = 24 << 20

// Config says what to put together.
type Config struct {
	// Agent is the static binary that becomes /init.
	Agent string
	// Console is the archive made by Console; empty leaves it out.
	Console string
	// Output is where the initrd is put, e.g. out/kuasar.initrd.
	Output string
}

// Build puts the initrd together and returns Output. An initrd that is the same already is left
// untouched.
func Build(ctx context.Context, cfg Config) (string, error) {
	records, err := Contents(cfg.Agent, cfg.Console)
	if err != nil {
		return "", fmt.Errorf("cannot build the initrd: %w", err)
	}
	var image bytes.Buffer
	if err := write(&image, records); err != nil {
		return "", fmt.Errorf("cannot build the initrd: %w", err)
	}
	if image.Len() > Limit {
		return "", fmt.Errorf("cannot build the initrd: it has %d bytes, more than %d", image.Len(), Limit)
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if err := Publish(image.Bytes(), cfg.Output); err != nil {
		return "", fmt.Errorf("cannot build the initrd: %w", err)
	}
	return cfg.Output, nil
}

// Contents are the guest's files, from the agent's binary and, if its path is not empty, the console's
// archive: for any kind of image, in no particular order, and without the folders that only lead to others.
func Contents(agentPath, consolePath string) ([]cpio.Record, error) {
	agent, err := os.ReadFile(agentPath)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent: %w", err)
	}
	if !bytes.HasPrefix(agent, []byte("\x7fELF")) {
		return nil, fmt.Errorf("cannot use the agent: %s is no ELF binary", agentPath)
	}
	records := []cpio.Record{
		cpio.StaticFile("init", string(agent), 0o755),
		cpio.StaticFile("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n", 0o644),
		cpio.StaticFile("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n", 0o644),
		cpio.StaticFile("etc/nsswitch.conf", "hosts: files dns\n", 0o644),
		// What the agent makes of the pod's configuration, so that the console's tools see it too.
		cpio.Symlink("etc/hostname", protocol.HostnamePath),
		cpio.Symlink("etc/hosts", protocol.HostsPath),
		cpio.Symlink("etc/resolv.conf", protocol.ResolvConfPath),
		// The kernel opens /dev/console for PID 1 before anybody could mount devtmpfs, and a PID 1
		// that cannot mount it must still be able to say so.
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.CharDev("dev/null", 0o666, 1, 3),
		cpio.CharDev("dev/kmsg", 0o644, 1, 11),
	}
	for _, dir := range []string{"bin", "mnt", "proc", "run", "sbin", "sys", "usr/bin", "usr/sbin", "var/log"} {
		records = append(records, cpio.Directory(dir, 0o755))
	}
	records = append(records, cpio.Directory("root", 0o700), cpio.Directory("tmp", 0o777|unix.S_ISVTX), cpio.Symlink("var/run", "/run"))
	if consolePath != "" {
		archive, err := os.ReadFile(consolePath)
		if err != nil {
			return nil, fmt.Errorf("cannot read the console's archive: %w", err)
		}
		records = append(records, cpio.StaticFile(strings.TrimPrefix(ConsoleArchive, "/"), string(archive), 0o644))
	}
	return records, nil
}

// Arrange returns records with the folders that lead to them, in the order of their names, so that
// every folder comes before what is in it. A name that is there twice is an error.
func Arrange(records []cpio.Record) ([]cpio.Record, error) {
	byName := map[string]cpio.Record{}
	for _, r := range records {
		if _, ok := byName[r.Name]; ok {
			return nil, fmt.Errorf("%s is packed twice", r.Name)
		}
		byName[r.Name] = r
	}
	for _, r := range records {
		for dir := path.Dir(r.Name); dir != "."; dir = path.Dir(dir) {
			if _, ok := byName[dir]; !ok {
				byName[dir] = cpio.Directory(dir, 0o755)
			}
		}
	}
	sorted := make([]cpio.Record, 0, len(byName))
	for _, r := range byName {
		sorted = append(sorted, r)
	}
	// A parent's name is a prefix of its children's, so it comes before them, as the kernel needs.
	slices.SortFunc(sorted, func(a, b cpio.Record) int { return cmp.Compare(a.Name, b.Name) })
	return sorted, nil
}

// write writes records as a newc archive that depends on nothing but their content: inodes, owners and
// times are fixed.
func write(w io.Writer, records []cpio.Record) error {
	sorted, err := Arrange(records)
	if err != nil {
		return err
	}
	archive := cpio.Newc.Writer(w)
	for i, r := range sorted {
		r.Ino, r.NLink, r.UID, r.GID, r.MTime = uint64(i+1), 1, 0, 0, 0
		if err := archive.WriteRecord(r); err != nil {
			return fmt.Errorf("cannot pack %s: %w", r.Name, err)
		}
	}
	return cpio.WriteTrailer(archive)
}

// Publish writes data to target, whole or not at all, unless it is there already.
func Publish(data []byte, target string) error {
	if old, err := os.ReadFile(target); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(target), ".tmp-")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	_, err = file.Write(data)
	err = errors.Join(err, file.Chmod(0o644), file.Close())
	if err == nil {
		err = os.Rename(file.Name(), target)
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", target, err)
	}
	return nil
}

// consoleFormat is raised when Console does something else with the same inputs.
const consoleFormat = 1

// Console builds the archive of the console's tools from the module in folder source
// (guest/initrd/console) for architecture arch, the host's if empty, or finds it in the cache, and
// returns its path in the cache. It takes about a minute the first time, and then says so on
// progress.
func Console(ctx context.Context, source, arch string, progress io.Writer) (string, error) {
	if arch == "" {
		arch = runtime.GOARCH
	}
	key := cache.NewKey(consoleFormat).Add("arch", arch).Add("go", runtime.Version())
	var files []string
	for _, pattern := range []string{"go.mod", "go.sum", "*.go", "*/*.go"} {
		found, err := filepath.Glob(filepath.Join(source, pattern))
		if err != nil {
			return "", err
		}
		files = append(files, found...)
	}
	if len(files) == 0 {
		return "", fmt.Errorf("cannot build the console: no module in %s", source)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		relative, err := filepath.Rel(source, file)
		if err != nil {
			return "", err
		}
		key.AddFile(relative, file)
	}
	sum, err := key.Sum()
	if err != nil {
		return "", fmt.Errorf("cannot build the console: %w", err)
	}
	const name = "console.cpio.gz"
	dir, err := cache.Entry(ctx, "console", sum, func(dir, scratch string) error {
		fmt.Fprintln(progress, "console: building the debug console's tools with u-root (about a minute)")
		cmd := exec.CommandContext(ctx, "go", "run", ".", arch, filepath.Join(dir, name))
		cmd.Dir = source
		// The module's own go.mod decides, whatever the caller works with.
		cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "GOWORK=off", "TMPDIR="+scratch)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("cannot build the console: %w: %s", err, strings.TrimSpace(string(out[max(0, len(out)-4000):])))
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, name), nil
}
