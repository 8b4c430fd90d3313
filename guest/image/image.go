// Package image builds a root file system for the guest that is a disk instead of an initrd: the same
// files, read-only. Pods share its pages in the host's cache, and a guest reads only what it uses of it,
// while an initrd is in the memory of every guest as a whole.
//
// It is made with the file systems' own programs, without root and without mounting anything, and is a pure
// function of the files that go in and of the version of those programs, byte by byte.
package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/initrd"
)

// The file systems that an image may have. The guest's kernel has both built in.
const (
	// EROFS cannot be written to by design, and needs neither a journal nor free space.
	EROFS = "erofs"
	// Ext4 is for hypervisors and tools that expect a file system that everybody knows.
	Ext4 = "ext4"
)

// Config says what to put together.
type Config struct {
	// Agent is the static binary that becomes /init and /sbin/init.
	Agent string
	// Console is the archive made by initrd.Console; empty leaves it out.
	Console string
	// FileSystem is EROFS or Ext4.
	FileSystem string
	// Output is where the image is put, e.g. out/kuasar-erofs.img.
	Output string
}

// uuid is that of every image: the guest has no other, and one at random would make other bytes.
const uuid = "6b756173-6172-4367-8000-726f6f746673"

// Build puts the image together and returns Output. An image that is the same already is left
// untouched. It needs mkfs.erofs, or mke2fs and debugfs.
func Build(ctx context.Context, cfg Config) (string, error) {
	made, err := build(ctx, cfg)
	if err == nil {
		err = initrd.Publish(made, cfg.Output)
	}
	if err != nil {
		return "", fmt.Errorf("cannot build the guest's image: %w", err)
	}
	return cfg.Output, nil
}

func build(ctx context.Context, cfg Config) ([]byte, error) {
	makers := map[string]func(context.Context, string, string, []cpio.Record) error{EROFS: makeEROFS, Ext4: makeExt4}
	maker := makers[cfg.FileSystem]
	if maker == nil {
		return nil, fmt.Errorf("the file system %q is neither %s nor %s", cfg.FileSystem, EROFS, Ext4)
	}
	records, err := contents(cfg)
	if err != nil {
		return nil, err
	}
	scratch, err := os.MkdirTemp("", "image")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(scratch)
	path := filepath.Join(scratch, "image")
	if err := maker(ctx, scratch, path, records); err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}

// contents are the files of the image, folders before what is in them.
func contents(cfg Config) ([]cpio.Record, error) {
	records, err := initrd.Contents(cfg.Agent, cfg.Console)
	if err != nil {
		return nil, err
	}
	// The kernel mounts its own /dev over that of a disk before it starts PID 1, so that there is no use for
	// nodes, which also take root to make.
	records = slices.DeleteFunc(records, func(r cpio.Record) bool { return r.Mode&cpio.S_IFMT == cpio.S_IFCHR })
	// Where the kernel looks first, on a disk.
	records = append(records, cpio.Directory("dev", 0o755), cpio.Symlink("sbin/init", "/init"))
	return initrd.Arrange(records)
}

// makeEROFS writes the files into a folder of scratch, of which mkfs.erofs makes the image. It is not
// compressed: reading would cost every guest what it saves the host once.
func makeEROFS(ctx context.Context, scratch, path string, records []cpio.Record) error {
	root := filepath.Join(scratch, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	for _, r := range records {
		if err := unpack(filepath.Join(root, r.Name), r); err != nil {
			return fmt.Errorf("cannot stage %s: %w", r.Name, err)
		}
	}
	// Attributes, which the host's file system may have given the files, are left out.
	return run(ctx, "mkfs.erofs", nil, "--quiet", "-T0", "-U", uuid, "--all-root", "-x-1", path, root)
}

// unpack makes the file, folder or link that r is, at path.
func unpack(path string, r cpio.Record) error {
	mode := os.FileMode(r.Mode & 0o777)
	switch r.Mode & cpio.S_IFMT {
	case cpio.S_IFDIR:
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		if r.Mode&unix.S_ISVTX != 0 {
			mode |= os.ModeSticky
		}
	case cpio.S_IFREG:
		data, err := data(r)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return err
		}
	case cpio.S_IFLNK:
		target, err := data(r)
		if err != nil {
			return err
		}
		return os.Symlink(string(target), path)
	default:
		return fmt.Errorf("it is of the kind %#o, which has no place in an image", r.Mode&cpio.S_IFMT)
	}
	return os.Chmod(path, mode)
}

func data(r cpio.Record) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
}

// block is the size of ext4's blocks, in bytes.
const block = 4096

// makeExt4 makes an empty file system, into which debugfs writes the files: mke2fs by itself copies the
// owners and times of the files on the host, of which some cannot be set there.
func makeExt4(ctx context.Context, scratch, path string, records []cpio.Record) error {
	// One second past the epoch, for a time of 0 means the current one to both programs.
	var script strings.Builder
	script.WriteString("set_current_time 19700101000001\n")
	blocks := 0
	for i, r := range records {
		content, err := data(r)
		if err != nil {
			return fmt.Errorf("cannot stage %s: %w", r.Name, err)
		}
		words := r.Name
		if r.Mode&cpio.S_IFMT == cpio.S_IFLNK {
			words += string(content)
		}
		if strings.ContainsAny(words, "\"\n") {
			return fmt.Errorf("cannot stage %q: debugfs takes no names with such characters", words)
		}
		dir, name := filepath.Split("/" + r.Name)
		fmt.Fprintf(&script, "cd \"%s\"\n", dir)
		blocks += len(content)/block + 2
		switch r.Mode & cpio.S_IFMT {
		case cpio.S_IFDIR:
			fmt.Fprintf(&script, "mkdir \"%s\"\n", name)
		case cpio.S_IFREG:
			staged := filepath.Join(scratch, fmt.Sprint(i))
			if err := os.WriteFile(staged, content, 0o600); err != nil {
				return err
			}
			fmt.Fprintf(&script, "write \"%s\" \"%s\"\n", staged, name)
		case cpio.S_IFLNK:
			fmt.Fprintf(&script, "symlink \"%s\" \"%s\"\n", name, content)
			continue // always of mode 0777
		default:
			return fmt.Errorf("cannot stage %s: it is of the kind %#o, which has no place in an image", r.Name, r.Mode&cpio.S_IFMT)
		}
		fmt.Fprintf(&script, "set_inode_field \"/%s\" mode 0%o\n", r.Name, r.Mode)
	}
	commands, defaults := filepath.Join(scratch, "commands"), filepath.Join(scratch, "mke2fs.conf")
	// The host's own defaults are for disks, and differ between distributions.
	for path, text := range map[string]string{commands: script.String(), defaults: "[fs_types]\n\text4 = {\n\t\tinode_size = 256\n\t}\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	// What the file system itself takes is less than a megabyte: it has no journal, and few inodes.
	blocks += blocks/64 + 256
	env := []string{"E2FSPROGS_FAKE_TIME=1", "TZ=UTC", "MKE2FS_CONFIG=" + defaults, "DEBUGFS_PAGER=cat"}
	err := run(ctx, "mke2fs", env, "-q", "-F", "-t", "ext4", "-T", "ext4", "-b", fmt.Sprint(block), "-N", fmt.Sprint(len(records)+16), "-m", "0",
		"-O", "none,extent,filetype,sparse_super,large_file,dir_index,metadata_csum,64bit,extra_isize",
		"-U", uuid, "-E", "hash_seed="+uuid+",root_owner=0:0,lazy_itable_init=0,nodiscard", path, fmt.Sprint(blocks))
	if err != nil {
		return err
	}
	return run(ctx, "debugfs", env, "-w", "-f", commands, path)
}

// run runs a program of the system's, which may be where only root's PATH leads. What the program says on
// stderr is an error, other than its name and version: debugfs ends with 0 whatever happens.
func run(ctx context.Context, name string, env []string, args ...string) error {
	program, err := exec.LookPath(name)
	if err != nil {
		program, err = exec.LookPath(filepath.Join("/usr/sbin", name))
	}
	if err != nil {
		return fmt.Errorf("%s is not installed; mkfs.erofs comes with erofs-utils, the others with e2fsprogs: %w", name, exec.ErrNotFound)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(append(os.Environ(), "LC_ALL=C"), env...)
	var said bytes.Buffer
	cmd.Stderr = &said
	err = cmd.Run()
	var lines []string
	for line := range strings.Lines(said.String()) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, name+" ") {
			lines = append(lines, line)
		}
	}
	if err == nil && len(lines) > 0 {
		err = errors.New("it complained")
	}
	if err != nil {
		text := strings.Join(lines, "; ")
		return fmt.Errorf("%s: %w: %s", name, err, text[:min(len(text), 2000)])
	}
	return nil
}
