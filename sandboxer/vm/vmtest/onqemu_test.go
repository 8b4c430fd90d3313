package vmtest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestTranslate pins what QEMU is asked for where the two hypervisors differ.
func TestTranslate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a,b")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	kernel := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(kernel, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{
		"-name", "sandbox-x", "-machine", "q35,mem-share=on", "-qmp", "unix:/run/q,server,nowait",
		"-kernel", kernel, "-append", "console=ttyS0", "-smp", "cpus=1", "-m", "256M", "-D", "-mem-prealloc",
		"-drive", "file=" + kernel + ",if=pflash,format=raw,unit=0,readonly=on",
		"-serial", "socket,path=/run/c,server,nowait",
		"-device", "virtio-serial-pci,id=s,bus=pcie.0,addr=0x2",
		"-chardev", "socket,id=agent,path=/run/a,server,nowait",
		"-device", "virtserialport,id=a0,chardev=agent,nr=1",
		"-drive", "id=rootfs,file=" + kernel + ",readonly=on,direct=off",
		"-device", "virtio-blk-pci,drive=rootfs,id=blk-0,bus=pcie.0,addr=0x4",
		"-device", "pcie-root-port,id=pcie.1,port=0x5,bus=pcie.0,addr=0x5",
		"-netdev", "tap,id=net0,fd=3",
		"-device", "virtio-net-pci,netdev=net0,id=nic0,mac=02:00:00:00:00:01,bus=pcie.0,addr=0x6",
	}
	release := Release{Major: 2, Minor: 4}
	line, err := ParseStratoVirt(release, args)
	if err != nil {
		t.Fatal(err)
	}
	translated, err := (&onQEMU{line: line}).translate(args, 4)
	if err != nil {
		t.Fatal(err)
	}
	said := strings.Join(translated, " ") + " "
	for _, want := range []string{
		"-object memory-backend-memfd,id=ram,size=256M,share=on,prealloc=on ",
		"-machine q35,memory-backend=ram ",
		"-chardev socket,id=monitor,fd=4 ",
		"-chardev socket,id=serial,path=/run/c,server=on,wait=off ",
		"-chardev socket,id=agent,path=/run/a,server=on,wait=off ",
		"-drive cache.direct=off,file=" + kernel + ",format=raw,id=rootfs,if=none,readonly=on ",
		"-device pcie-root-port,addr=0x5,bus=pcie.0,chassis=1,id=pcie.1,port=0x5,slot=1 ",
		"-netdev tap,fd=3,id=net0,vhost=off ",
		",romfile= ",
	} {
		if !strings.Contains(said, want) {
			t.Errorf("%q is not in %s", want, said)
		}
	}
	for _, unwanted := range []string{"pflash", "mem-share", "nowait", "-D "} {
		if strings.Contains(said, unwanted) {
			t.Errorf("%q is in %s", unwanted, said)
		}
	}
	// A port of a version that has none is refused before anything is started.
	if _, err := ParseStratoVirt(Release{Major: 2, Minor: 2}, args); err == nil || !strings.Contains(err.Error(), "virtserialport") {
		t.Errorf("2.2 took a virtserialport: %v", err)
	}
	if got := joined(map[string]string{"type": "x", "path": file}); !strings.HasSuffix(got, "/a,,b") {
		t.Errorf("a comma for QEMU: %s", got)
	}
}
