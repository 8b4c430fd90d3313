package devices

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func fakeSysfs(t *testing.T, files map[string]string) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	old := sysfs
	sysfs = dir
	t.Cleanup(func() { sysfs = old })
}

func TestFind(t *testing.T) {
	fakeSysfs(t, map[string]string{
		"block/vda/serial":                 "root",
		"block/vdb/serial":                 "12345678901234567890", // no newline, as virtio-blk
		"block/loop0/size":                 "0",
		"block/sda/device/vpd_pg80":        "\x00\x80\x00\x05disk5",
		"block/sdb/device/vpd_pg80":        "\x00\x80\x00\x00",
		"class/virtio-ports/vport0p1/name": "org.example\n",
		"class/virtio-ports/vport0p2/name": "kuasar.agent.0\n",
	})
	if path, ok := findDisk("12345678901234567890"); path != "/dev/vdb" || !ok {
		t.Errorf("disk: %q, %v", path, ok)
	}
	if path, ok := findDisk("disk5"); path != "/dev/sda" || !ok {
		t.Errorf("SCSI disk: %q, %v", path, ok)
	}
	if path, ok := NamelessSerialPort(); ok {
		t.Errorf("a port with a name was taken for one without: %q", path)
	}
	if path, ok := findDisk("1234"); ok {
		t.Errorf("part of a serial number found %q", path)
	}
	if path, ok := SerialPort("kuasar.agent.0"); path != "/dev/vport0p2" || !ok {
		t.Errorf("port: %q, %v", path, ok)
	}
	if _, ok := SerialPort("kuasar.agent"); ok {
		t.Error("part of a port's name was found")
	}
}

func TestNamelessSerialPort(t *testing.T) {
	fakeSysfs(t, map[string]string{"class/virtio-ports/vport2p0/dev": "", "class/virtio-ports/vport2p1/dev": ""})
	if path, ok := NamelessSerialPort(); path != "/dev/vport2p1" || !ok {
		t.Errorf("%q, %v", path, ok)
	}
}

func TestDiskGivesUpWithContext(t *testing.T) {
	fakeSysfs(t, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if _, err := Disk(ctx, "none"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	for _, serial := range []string{"", "123456789012345678901"} {
		if _, err := Disk(context.Background(), serial); err == nil {
			t.Errorf("serial %q was accepted", serial)
		}
	}
}

func TestParseEvent(t *testing.T) {
	e, ok := parseEvent([]byte("add@/devices/pci0000:00/virtio1/block/vda\x00ACTION=add\x00SUBSYSTEM=block\x00SEQNUM=7\x00"))
	if want := (event{"add", "/devices/pci0000:00/virtio1/block/vda", "block"}); e != want || !ok {
		t.Errorf("%+v, %v", e, ok)
	}
	for _, b := range []string{"", "\x00", "libudev\x00..."} {
		if e, ok := parseEvent([]byte(b)); ok {
			t.Errorf("%q was taken for %+v", b, e)
		}
	}
}
