package repositories

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/goreleaser/nfpm/v2"
	"github.com/goreleaser/nfpm/v2/files"
	_ "github.com/goreleaser/nfpm/v2/rpm" // the packager
)

// A standIn is a package in the place of a real one.
type standIn struct {
	name, version, release string
	provides               []string
	// programs are paths of scripts that do nothing.
	programs []string
	contents files.Contents
}

// bare is the base of a system. Its systemctl writes each call to /var/log/systemctl.
func bare() []standIn {
	const systemctl = "#!/bin/sh\necho \"$*\" >>/var/log/systemctl\n"
	contents := files.Contents{
		link("/bin", "usr/bin"), link("/sbin", "usr/sbin"), link("/lib", "usr/lib"),
		file("/usr/bin/systemctl", systemctl, 0o755),
	}
	for _, dir := range []string{"/dev", "/etc", "/etc/sysconfig", "/proc", "/run", "/tmp", "/usr", "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib/systemd/system", "/usr/share", "/var", "/var/lib", "/var/log"} {
		contents = append(contents, &files.Content{Destination: dir, Type: files.TypeDir, FileInfo: &files.ContentFileInfo{Mode: 0o755}})
	}
	return []standIn{{
		name: "basesystem", version: "12.0", release: "3.oe2203",
		provides: []string{"filesystem", "bash", "/bin/sh", "systemd = 249", "glibc", "kmod"},
		contents: append(contents, shell()...),
	}}
}

// shell is this machine's static busybox with the names that scriptlets use.
func shell() files.Contents {
	path, err := exec.LookPath("busybox")
	if err != nil {
		path = "/usr/bin/busybox" // whose absence nfpm reports
	}
	contents := files.Contents{{Source: path, Destination: "/usr/bin/busybox", FileInfo: &files.ContentFileInfo{Mode: 0o755}}}
	for _, applet := range []string{"sh", "cat", "chmod", "cp", "echo", "getent", "grep", "ls", "ln", "mkdir", "mv", "rm", "sed", "test", "touch", "tr", "true"} {
		contents = append(contents, link("/usr/bin/"+applet, "busybox"))
	}
	return contents
}

// guide is what openEuler's repositories have of what the guide names, and of what one could take
// instead. Its containerd has no Sandbox API.
func guide(arch string) []standIn {
	list := []standIn{
		{name: "stratovirt", version: "2.4.0", release: "3.oe2203", programs: []string{"/usr/bin/stratovirt"}},
		{name: "iSulad", version: "2.1.5", release: "2.oe2203", programs: []string{"/usr/bin/isulad"}},
		{name: "virtiofsd", version: "1.10.1", release: "1.oe2203", programs: []string{"/usr/libexec/virtiofsd"}},
		{name: "containernetworking-plugins", version: "1.3.0", release: "1.oe2203"},
		{name: "cri-tools", version: "1.29.0", release: "1.oe2203", programs: []string{"/usr/bin/crictl"}},
		{name: "containerd", version: "1.6.22", release: "1.oe2203", programs: []string{"/usr/bin/containerd"}},
		{name: "qemu", version: "6.2.0", release: "90.oe2203", programs: []string{"/usr/bin/qemu-system-" + arch}},
	}
	if arch == "x86_64" {
		list = append(list, standIn{name: "edk2-ovmf", version: "202011", release: "1.oe2203"})
	}
	return list
}

// plain is a distribution without openEuler's own packages.
func plain(arch string) []standIn {
	return []standIn{
		{name: "containerd", version: "2.4.2", release: "1", programs: []string{"/usr/bin/containerd"}},
		{name: "qemu-kvm-core", version: "9.1.0", release: "1", provides: []string{"qemu-kvm = 9.1.0"}, programs: []string{"/usr/libexec/qemu-kvm"}},
	}
}

// debian stands for a root file system whose programs another package manager has installed.
func debian(arch string) []standIn {
	return []standIn{{
		name: "debian-base", version: "12", release: "1",
		provides: []string{
			"systemd = 252", "/bin/sh", "kmod", "/usr/bin/qemu-system-" + arch, "virtiofsd = 7.2.0",
			"containerd = 2.4.2", "containernetworking-plugins = 1.9.1",
		},
	}}
}

func link(path, target string) *files.Content {
	return &files.Content{Source: target, Destination: path, Type: files.TypeSymlink}
}

// file is a file with this text, which build writes for nfpm to read.
func file(path, text string, mode os.FileMode) *files.Content {
	return &files.Content{Source: inline + text, Destination: path, FileInfo: &files.ContentFileInfo{Mode: mode}}
}

// inline begins a source that is the text itself.
const inline = "text:"

// build writes the package into a directory, signed if key, an armored private one, is not empty.
func (s standIn) build(dir, arch string, at time.Time, key string) error {
	if err := s.write(dir, arch, at, key); err != nil {
		return fmt.Errorf("cannot make the stand-in of %s: %w", s.name, err)
	}
	return nil
}

func (s standIn) write(dir, arch string, at time.Time, key string) (err error) {
	scratch, err := os.MkdirTemp("", "stand-in-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	list := slices.Clone(s.contents)
	for _, program := range s.programs {
		list = append(list, file(program, "#!/bin/sh\n", 0o755))
	}
	var contents files.Contents
	for i, listed := range list {
		c := *listed // nfpm changes what it is given, and a stand-in may be built twice
		if text, ok := strings.CutPrefix(c.Source, inline); ok {
			c.Source = filepath.Join(scratch, fmt.Sprint(i))
			if err := os.WriteFile(c.Source, []byte(text), 0o600); err != nil {
				return err
			}
		}
		info := files.ContentFileInfo{}
		if c.FileInfo != nil {
			info = *c.FileInfo
		}
		info.Owner, info.Group, info.MTime = "root", "root", at
		c.FileInfo = &info
		contents = append(contents, &c)
	}
	info := nfpm.WithDefaults(&nfpm.Info{
		Name: s.name, Arch: arch, Platform: "linux", Version: s.version, VersionSchema: "none", Release: s.release,
		Maintainer: "Kuasar's tests <tests@kuasar.io>", License: "Apache-2.0", Description: "Stands for " + s.name + " in Kuasar's tests.",
		MTime: at, DisableGlobbing: true,
		Overridables: nfpm.Overridables{
			Provides: s.provides, Contents: contents,
			RPM: nfpm.RPM{BuildHost: "localhost", Signature: nfpm.RPMSignature{PackageSignature: nfpm.PackageSignature{SignFn: signer(key, at)}}},
		},
	})
	if err := nfpm.Validate(info); err != nil {
		return err
	}
	format, err := nfpm.Get("rpm")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	out, err := os.Create(filepath.Join(dir, format.ConventionalFileName(info)))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	return format.Package(info, out)
}

func signer(key string, at time.Time) func(io.Reader) ([]byte, error) {
	if key == "" {
		return nil
	}
	return func(data io.Reader) ([]byte, error) {
		ring, err := openpgp.ReadArmoredKeyRing(strings.NewReader(key))
		if err != nil {
			return nil, err
		}
		var signature bytes.Buffer
		err = openpgp.DetachSign(&signature, ring[0], data, &packet.Config{DefaultHash: crypto.SHA256, Time: func() time.Time { return at }})
		return signature.Bytes(), err
	}
}
