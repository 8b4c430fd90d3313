package containers

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

func TestCheckMountPoint(t *testing.T) {
	for point, ok := range map[string]bool{
		"/run/kuasar/storage/c1": true, "/run/kuasar/storage/a/b": true,
		"/run/kuasar/storage": false, "/run/kuasar/storage/": false, "/run/kuasar/storage/../x": false, "/run/kuasar/storage/a/../../x": false,
		"/run/kuasar/storagex": false, "/etc": false, "": false, "run/kuasar/storage/a": false, "/run/kuasar/storage//a": false,
	} {
		err := checkMountPoint("/run/kuasar/storage", point)
		if (err == nil) != ok || !ok && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", point, err)
		}
	}
}

func TestMountOptions(t *testing.T) {
	flags, data := mountOptions([]string{"ro", "nosuid", "size=64m", "nodev", "dev", "", "mode=700", "defaults", "relatime"})
	if flags != unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_RELATIME || data != "size=64m,mode=700" {
		t.Errorf("flags %#x, data %q", flags, data)
	}
	if flags, _ := mountOptions([]string{"ro", "rw"}); flags != 0 {
		t.Errorf("flags %#x", flags)
	}
}

func TestFindDisk(t *testing.T) {
	sys := t.TempDir()
	disk := func(name, serial string) {
		if err := os.MkdirAll(filepath.Join(sys, name), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(sys, name, "serial"), serial)
	}
	disk("vda", "first\n")
	disk("vdb", "second")
	disk("sda", "third")
	if dev, err := findDisk(sys, "second", 0); err != nil || dev != "/dev/vdb" {
		t.Errorf("%q, %v", dev, err)
	}
	if _, err := findDisk(sys, "third", 0); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "third") {
		t.Errorf("not a virtio disk: %v", err)
	}
	for _, serial := range []string{"", "../x", strings.Repeat("x", 21), "a b"} {
		if _, err := findDisk(sys, serial, 0); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", serial, err)
		}
	}
	// A disk that is plugged in while it is waited for.
	go func() {
		time.Sleep(20 * time.Millisecond)
		os.MkdirAll(filepath.Join(sys, "vdc"), 0o755)
		os.WriteFile(filepath.Join(sys, "vdc", "serial"), []byte("late"), 0o644)
	}()
	if dev, err := findDisk(sys, "late", 10*time.Second); err != nil || dev != "/dev/vdc" {
		t.Errorf("%q, %v", dev, err)
	}
}

func TestStorages(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := t.TempDir()
	tmpfs := func(name string, options ...string) *protocol.Storage {
		return &protocol.Storage{Kind: protocol.Storage_TMPFS, MountPoint: filepath.Join(dir, name), Options: options}
	}
	m, err := mountStorages(dir, []*protocol.Storage{tmpfs("a", "size=64k", "mode=0700", "noexec"), tmpfs("a/b")})
	if err != nil {
		t.Fatal(err)
	}
	defer m.unmount()
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Join(dir, "a"), &st); err != nil || st.Type != unix.TMPFS_MAGIC || st.Blocks*uint64(st.Bsize) != 64<<10 || st.Flags&unix.ST_NOEXEC == 0 {
		t.Errorf("%+v, %v", st, err)
	}
	if err := m.unmount(); err != nil {
		t.Fatal(err)
	}
	if err := m.unmount(); err != nil {
		t.Errorf("second unmount: %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
	// A failure in the middle undoes what was mounted before.
	for _, bad := range []*protocol.Storage{
		{MountPoint: filepath.Join(dir, "b")},
		{Kind: protocol.Storage_BLOCK, MountPoint: filepath.Join(dir, "b"), Serial: "s"},
		{Kind: protocol.Storage_TMPFS, MountPoint: filepath.Join(dir, "b"), Options: []string{"nonsense=1"}},
	} {
		if _, err := mountStorages(dir, []*protocol.Storage{tmpfs("a"), bad}); err == nil {
			t.Errorf("%v was mounted", bad)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}
