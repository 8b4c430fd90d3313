package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
}

// podDir is a state directory on a file system of the wanted kind; "" is the temporary directory's.
func podDir(t *testing.T, fstype string) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if fstype != "" {
		if err := unix.Mount(fstype, dir, fstype, 0, ""); err != nil {
			t.Skipf("cannot mount %s: %v", fstype, err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
	return dir
}

func newShare(t *testing.T, dir string) *Share {
	t.Helper()
	s, err := NewShare(dir)
	if errors.Is(err, unix.EPERM) {
		t.Skipf("cannot mount: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func wantText(t *testing.T, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || string(got) != want {
		t.Errorf("%s: got %q, %v; want %q", path, got, err, want)
	}
}

// overlay lays out an overlay of n lower layers, layer i holding a file l<i>.
func overlay(t *testing.T, n int) (m Mount, upper string) {
	t.Helper()
	top := filepath.Join(t.TempDir(), "snapshots")
	var lower []string
	for i := range n {
		dir := filepath.Join(top, fmt.Sprint(i), "fs")
		write(t, filepath.Join(dir, fmt.Sprintf("l%d", i)), fmt.Sprint(i))
		lower = append(lower, dir)
	}
	upper, work := filepath.Join(top, "rw", "fs"), filepath.Join(top, "rw", "work")
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return Mount{Type: "overlay", Source: "overlay", Options: []string{
		"index=off", "workdir=" + work, "upperdir=" + upper, "lowerdir=" + strings.Join(lower, ":"),
	}}, upper
}

// below lists the mount points beneath dir.
func mountsBelow(t *testing.T, dir string) []string {
	t.Helper()
	infos, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, dir+"/"), false
	})
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for _, i := range infos {
		points = append(points, i.Mountpoint)
	}
	return points
}

// at is the directory of a container as the machine sees it.
func at(t *testing.T, s *Share, id string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(s.Exported(), id+".*"))
	if err != nil || len(found) != 1 {
		t.Fatalf("directories of container %s: %q, %v", id, found, err)
	}
	return found[0]
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	if left := mountsBelow(t, dir); len(left) > 0 {
		t.Errorf("mounts left: %q", left)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		t.Errorf("left in the state directory: %s", e.Name())
	}
}

func TestShare(t *testing.T) {
	needRoot(t)
	for _, fstype := range []string{"", "tmpfs"} {
		t.Run("on "+fstype, func(t *testing.T) {
			dir := podDir(t, fstype)
			s := newShare(t, dir)
			m, upper := overlay(t, 2)
			guest, err := s.Rootfs(t.Context(), "c1", []Mount{m})
			if err != nil {
				t.Fatal(err)
			}
			if guest != protocol.SharePath+"/"+filepath.Base(at(t, s, "c1"))+"/rootfs" {
				t.Errorf("guest path %s", guest)
			}
			root := filepath.Join(at(t, s, "c1"), "rootfs")
			wantText(t, root+"/l1", "1")
			write(t, root+"/new", "text") // within the container the guest may write
			wantText(t, upper+"/new", "text")
			if err := os.WriteFile(filepath.Join(at(t, s, "c1"), "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("writing above the container's root: %v", err)
			}
			if err := os.Symlink("/etc", filepath.Join(s.Exported(), "c2")); !errors.Is(err, unix.EROFS) {
				t.Errorf("planting a link: %v", err)
			}
			if _, err := s.Rootfs(t.Context(), "c1", []Mount{m}); !errors.Is(err, unix.EEXIST) {
				t.Errorf("a second root: %v", err)
			}
			wantText(t, root+"/l1", "1") // and the first one is still there

			file := write(t, filepath.Join(t.TempDir(), "file"), "file")
			data := filepath.Dir(write(t, filepath.Join(t.TempDir(), "data", "f"), "f"))
			for i, v := range []struct {
				source   string
				readOnly bool
			}{{data, false}, {file, false}, {data, true}, {file, true}} {
				guest, err := s.Volume(t.Context(), "c1", v.source, v.readOnly)
				if err != nil {
					t.Fatal(err)
				}
				if want := fmt.Sprintf("%s/%s/vol%d", protocol.SharePath, filepath.Base(at(t, s, "c1")), i); guest != want {
					t.Errorf("guest path %s, want %s", guest, want)
				}
				p := filepath.Join(at(t, s, "c1"), fmt.Sprintf("vol%d", i))
				if v.source == data {
					p += "/f"
				}
				err = os.WriteFile(p, []byte("changed"), 0o644)
				if v.readOnly != errors.Is(err, unix.EROFS) {
					t.Errorf("read-only %t, writing %s: %v", v.readOnly, p, err)
				}
			}
			wantText(t, file, "changed")
			wantText(t, data+"/f", "changed")

			if err := s.Release("c1"); err != nil {
				t.Fatal(err)
			}
			if err := s.Release("c1"); err != nil {
				t.Errorf("second Release: %v", err)
			}
			if entries, _ := os.ReadDir(s.Exported()); len(entries) != 0 {
				t.Errorf("left in the share: %v", entries)
			}
			wantText(t, file, "changed")
			wantText(t, upper+"/new", "text")
			for range 2 {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
			wantEmpty(t, dir)
		})
	}
}

// The daemon may run where / is shared, as systemd has it, or private.
func TestShareBelowSharedMount(t *testing.T) {
	needRoot(t)
	dir := podDir(t, "tmpfs")
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	peer := podDir(t, "")
	if err := unix.Mount(dir, peer, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(peer, unix.MNT_DETACH) })
	s := newShare(t, dir)
	if _, err := s.Volume(t.Context(), "c1", t.TempDir(), false); err != nil {
		t.Fatal(err)
	}
	for _, p := range mountsBelow(t, peer) {
		if strings.Contains(p, "vol0") {
			t.Errorf("the container's mounts leak to %s", p)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, dir)
	if left := mountsBelow(t, peer); len(left) > 0 {
		t.Errorf("left at a peer: %q", left)
	}
}

func TestVolumeTakesSubmountsAndLeaksNothing(t *testing.T) {
	needRoot(t)
	source := podDir(t, "tmpfs")
	if err := unix.Mount("", source, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(source, "a", "sub")
	if err := os.MkdirAll(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", sub, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(sub, unix.MNT_DETACH) })
	write(t, sub+"/f", "sub")
	dir := podDir(t, "tmpfs")
	s := newShare(t, dir)
	for _, readOnly := range []bool{false, true} {
		if _, err := s.Volume(t.Context(), "c1", source, readOnly); err != nil {
			t.Fatal(err)
		}
	}
	vol := filepath.Join(at(t, s, "c1"), "vol0")
	wantText(t, vol+"/a/sub/f", "sub")
	if err := os.WriteFile(filepath.Join(at(t, s, "c1"), "vol1", "a", "sub", "f"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing below a read-only volume: %v", err)
	}
	// Device nodes that the guest makes are dead on the host.
	node := filepath.Join(vol, "null")
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if f, err := os.Open(node); err == nil {
		f.Close()
		t.Error("a device node in a volume can be opened")
	}
	// Later mounts at the source do not come into the share, nor the other way round.
	late := filepath.Join(source, "late")
	if err := os.Mkdir(late, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", late, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(late, unix.MNT_DETACH) })
	if slices.Contains(mountsBelow(t, dir), vol+"/late") {
		t.Error("a later mount came into the share")
	}
	// The guest renames what leads to a submount, and puts a link in its place, before the release.
	if err := os.Rename(filepath.Join(vol, "a"), filepath.Join(vol, "b")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/", filepath.Join(vol, "a")); err != nil {
		t.Fatal(err)
	}
	if err := s.Release("c1"); err != nil {
		t.Fatal(err)
	}
	if left := mountsBelow(t, filepath.Join(dir, "mounts")); len(left) > 0 {
		t.Errorf("mounts left: %q", left)
	}
	if mounted, _ := mountinfo.Mounted(filepath.Join(source, "b", "sub")); !mounted {
		t.Error("the release unmounted the source's own mount")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, dir)
	unix.Unmount(filepath.Join(source, "b", "sub"), unix.MNT_DETACH)
}

func TestManyLayers(t *testing.T) {
	needRoot(t)
	dir := podDir(t, "tmpfs")
	s := newShare(t, dir)
	m, _ := overlay(t, 100)
	if n := len(strings.Join(m.Options, ",")); n <= maxData {
		t.Fatalf("the options are only %d bytes", n)
	}
	if _, err := s.Rootfs(t.Context(), "c1", []Mount{m}); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		wantText(t, filepath.Join(at(t, s, "c1"), "rootfs", fmt.Sprintf("l%d", i)), fmt.Sprint(i))
	}
}

func TestBindRootfs(t *testing.T) {
	needRoot(t)
	s := newShare(t, podDir(t, "tmpfs"))
	image := filepath.Dir(write(t, filepath.Join(t.TempDir(), "image", "f"), "f"))
	if _, err := s.Rootfs(t.Context(), "view", []Mount{{Type: "bind", Source: image, Options: []string{"rbind", "ro"}}}); err != nil {
		t.Fatal(err)
	}
	f := filepath.Join(at(t, s, "view"), "rootfs", "f")
	wantText(t, f, "f")
	if err := os.WriteFile(f, nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing to a read-only root: %v", err)
	}
	// Mounts over one another: the last is what the container sees.
	m, _ := overlay(t, 1)
	if _, err := s.Rootfs(t.Context(), "stack", []Mount{{Type: "bind", Source: image, Options: []string{"rbind"}}, m}); err != nil {
		t.Fatal(err)
	}
	wantText(t, filepath.Join(at(t, s, "stack"), "rootfs", "l0"), "0")
	for _, id := range []string{"view", "stack"} {
		if err := s.Release(id); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSourceBehindLink(t *testing.T) {
	needRoot(t)
	s := newShare(t, podDir(t, "tmpfs"))
	real := filepath.Dir(write(t, filepath.Join(t.TempDir(), "real", "f"), "f"))
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Volume(t.Context(), "c1", link, false); err != nil {
		t.Fatal(err)
	}
	wantText(t, filepath.Join(at(t, s, "c1"), "vol0", "f"), "f")
}

func TestPlantedLinksAreRefused(t *testing.T) {
	needRoot(t)
	victim := t.TempDir()
	for name, plant := range map[string]string{
		"container": "c1", "rootfs": "c1/rootfs", "volume": "c1/vol0",
	} {
		t.Run(name, func(t *testing.T) {
			dir := podDir(t, "tmpfs")
			s := newShare(t, dir)
			p := filepath.Join(dir, "mounts", plant)
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(victim, p); err != nil {
				t.Fatal(err)
			}
			var err error
			if name == "volume" {
				_, err = s.Volume(t.Context(), "c1", t.TempDir(), false)
			} else {
				m, _ := overlay(t, 1)
				_, err = s.Rootfs(t.Context(), "c1", []Mount{m})
			}
			if !errors.Is(err, ErrTampered) || !strings.Contains(err.Error(), "refused") {
				t.Errorf("got %v", err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			wantEmpty(t, dir)
			if left := mountsBelow(t, victim); len(left) > 0 {
				t.Errorf("mounted at the victim: %q", left)
			}
			if _, err := os.Stat(victim); err != nil {
				t.Errorf("the victim: %v", err)
			}
		})
	}
}

func TestFailuresLeaveNothing(t *testing.T) {
	needRoot(t)
	dir := podDir(t, "tmpfs")
	s := newShare(t, dir)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	good, _ := overlay(t, 1)
	image := Mount{Type: "bind", Source: t.TempDir(), Options: []string{"rbind"}}
	for name, tc := range map[string]struct {
		do   func() error
		want string
	}{
		"no mounts":    {func() error { _, err := s.Rootfs(t.Context(), "c", nil); return err }, "no mounts"},
		"unknown type": {func() error { _, err := s.Rootfs(t.Context(), "c", []Mount{{Type: "nofs"}}); return err }, "modprobe nofs"},
		"second fails": {func() error { _, err := s.Rootfs(t.Context(), "c", []Mount{image, {Type: "nofs"}}); return err }, "nofs"},
		"bad option": {func() error {
			_, err := s.Rootfs(t.Context(), "c", []Mount{{Type: "bind", Source: "/", Options: []string{"x=y"}}})
			return err
		}, `"x=y"`},
		"loop": {func() error {
			_, err := s.Rootfs(t.Context(), "c", []Mount{{Type: "ext4", Options: []string{"loop"}}})
			return err
		}, "not supported"},
		"file as root": {func() error {
			_, err := s.Rootfs(t.Context(), "c", []Mount{{Type: "bind", Source: "/etc/passwd"}})
			return err
		}, "no directory"},
		"lower gone": {func() error {
			_, err := s.Rootfs(t.Context(), "c", []Mount{{Type: "overlay", Options: []string{"lowerdir=/nonexistent1:/nonexistent2"}}})
			return err
		}, "/nonexistent1"},
		"cancelled":     {func() error { _, err := s.Rootfs(cancelled, "c", []Mount{good}); return err }, "canceled"},
		"volume gone":   {func() error { _, err := s.Volume(t.Context(), "c", "/nonexistent", false); return err }, "/nonexistent"},
		"relative":      {func() error { _, err := s.Volume(t.Context(), "c", "etc", false); return err }, "absolute"},
		"FIFO":          {func() error { _, err := s.Volume(t.Context(), "c", fifo, false); return err }, "a FIFO"},
		"device":        {func() error { _, err := s.Volume(t.Context(), "c", "/dev/null", false); return err }, "a character device"},
		"late":          {func() error { _, err := s.Volume(cancelled, "c", "/etc", false); return err }, "canceled"},
		"id with slash": {func() error { _, err := s.Volume(t.Context(), "a/b", "/etc", false); return err }, "no container id"},
		"id dots":       {func() error { _, err := s.Volume(t.Context(), "..", "/etc", false); return err }, "no container id"},
		"long id":       {func() error { return s.Release(strings.Repeat("a", 129)) }, "no container id"},
		"empty id":      {func() error { return s.Release("") }, "no container id"},
	} {
		t.Run(name, func(t *testing.T) {
			err := tc.do()
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error with %q", err, tc.want)
			}
			if err := s.Release("c"); err != nil {
				t.Error(err)
			}
			if entries, _ := os.ReadDir(s.Exported()); len(entries) != 0 {
				t.Errorf("left in the share: %v", entries)
			}
		})
	}
}

func TestBusyMountsAreReleased(t *testing.T) {
	needRoot(t)
	dir := podDir(t, "tmpfs")
	s := newShare(t, dir)
	m, _ := overlay(t, 1)
	if _, err := s.Rootfs(t.Context(), "c1", []Mount{m}); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(at(t, s, "c1"), "rootfs", "l0")) // the guest still reads
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Release("c1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, dir)
}

func TestAfterRestart(t *testing.T) {
	needRoot(t)
	dir := podDir(t, "tmpfs")
	s := newShare(t, dir)
	m, _ := overlay(t, 1)
	if _, err := s.Rootfs(t.Context(), "c1", []Mount{m}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Volume(t.Context(), "c1", t.TempDir(), false); err != nil {
		t.Fatal(err)
	}
	again, err := OpenShare(dir)
	if err != nil {
		t.Fatal(err)
	}
	guest, err := again.Volume(t.Context(), "c1", t.TempDir(), false)
	if err != nil || !strings.HasSuffix(guest, "/vol1") || filepath.Base(filepath.Dir(guest)) != filepath.Base(at(t, again, "c1")) {
		t.Errorf("got %s, %v", guest, err)
	}
	if err := RemoveShare(dir); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, dir)
	if _, err := OpenShare(dir); err == nil {
		t.Error("opened a share that is gone")
	}
	if err := RemoveShare(filepath.Join(dir, "gone")); err != nil {
		t.Errorf("removing nothing: %v", err)
	}
}

func TestCloseTakesForeignMounts(t *testing.T) {
	needRoot(t)
	dir := podDir(t, "tmpfs")
	s := newShare(t, dir)
	for _, p := range []string{"c1", "c2/x/y"} {
		at := filepath.Join(dir, "mounts", p)
		if err := os.MkdirAll(at, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", at, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	err := s.Close()
	if left := mountsBelow(t, dir); len(left) > 0 {
		t.Errorf("mounts left: %q", left)
	}
	// A directory that nobody here made, with something in it, is not this package's to remove.
	if !errors.Is(err, unix.ENOTEMPTY) || !strings.Contains(err.Error(), "removing x") {
		t.Errorf("got %v", err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "mounts", "c2")); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, dir)
}

func TestExistingTreeIsRefused(t *testing.T) {
	needRoot(t)
	for _, name := range []string{"mounts", "shared"} {
		dir := podDir(t, "")
		if err := os.Symlink("/etc", filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if _, err := NewShare(dir); !errors.Is(err, os.ErrExist) {
			t.Errorf("got %v", err)
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 1 {
			t.Errorf("left: %v", entries)
		}
	}
	// A second share of a pod must not cost the first.
	dir := podDir(t, "tmpfs")
	s := newShare(t, dir)
	if _, err := s.Volume(t.Context(), "c1", t.TempDir(), false); err != nil {
		t.Fatal(err)
	}
	if _, err := NewShare(dir); !errors.Is(err, os.ErrExist) {
		t.Errorf("a second share: %v", err)
	}
	if mounted, err := mountinfo.Mounted(filepath.Join(at(t, s, "c1"), "vol0")); !mounted {
		t.Errorf("the first share lost its volume: %v", err)
	}
}

func TestCommonDir(t *testing.T) {
	for _, tc := range []struct {
		paths []string
		want  string
	}{
		{[]string{"/a/b/1/fs", "/a/b/2/fs"}, "/a/b"},
		{[]string{"/a/b/1/fs"}, "/a/b/1"},
		{[]string{"/a/b/1", "/a/bc/2"}, "/a"},
		{[]string{"/a", "/b"}, "/"},
		{[]string{"/a/b/c", "/a"}, "/"},
		{[]string{"/a/b", "rel"}, ""},
		{nil, ""},
	} {
		if got := commonDir(tc.paths); got != tc.want {
			t.Errorf("commonDir(%q) = %q, want %q", tc.paths, got, tc.want)
		}
	}
}

func TestShortenRefuses(t *testing.T) {
	for _, o := range []string{"lowerdir=/a::/b", `lowerdir=/a\:b`, "lowerdir=a:b"} {
		if text, _, err := shorten([]string{o}); err == nil {
			t.Errorf("%s became %s", o, text)
		}
	}
}

// The guest remembers for a second what a name stood for.
func TestNamesDoNotComeTwice(t *testing.T) {
	needRoot(t)
	dir := podDir(t, "tmpfs")
	s := newShare(t, dir)
	m, _ := overlay(t, 1)
	seen := map[string]bool{}
	for range 3 {
		root, err := s.Rootfs(t.Context(), "c1", []Mount{m})
		if err != nil {
			t.Fatal(err)
		}
		volume, err := s.Volume(t.Context(), "c1", t.TempDir(), false)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Dir(root) != filepath.Dir(volume) {
			t.Errorf("%s and %s are apart", root, volume)
		}
		if seen[filepath.Dir(root)] {
			t.Errorf("%s came twice", root)
		}
		seen[filepath.Dir(root)] = true
		// The next daemon goes on.
		if s, err = OpenShare(dir); err != nil {
			t.Fatal(err)
		}
		if err := s.Release("c1"); err != nil {
			t.Fatal(err)
		}
		if left, _ := os.ReadDir(s.Exported()); len(left) > 0 {
			t.Errorf("left in the share: %v", left)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, dir)
}

// Containers whose ids look alike do not share directories, and earlier daemons' directories are released.
func TestDirectoriesOfOthers(t *testing.T) {
	needRoot(t)
	s := newShare(t, podDir(t, "tmpfs"))
	for _, id := range []string{"c", "c.d", "c.0"} {
		if _, err := s.Volume(t.Context(), id, t.TempDir(), false); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(s.mounts(), "c", "vol0"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.Release("c"); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(s.Exported())
	if err != nil || len(left) != 2 || !strings.HasPrefix(left[0].Name(), "c.0.") || !strings.HasPrefix(left[1].Name(), "c.d.") {
		t.Errorf("left are %v, %v", left, err)
	}
}
