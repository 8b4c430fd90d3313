package rpm

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"time"

	"github.com/goreleaser/nfpm/v2/files"
)

// A member is a file, link or directory of the package.
type member struct {
	path string // where it is installed
	kind string // as in package files of nfpm
	mode fs.FileMode
	// source is a file relative to the root, or absolute.
	source string
	target string // of a link
	maker  string // what makes source, for people
	pack   func([]byte) ([]byte, error)
	size   int64
}

const (
	made   = "go tool mage build"
	source = "the source tree" // where the file belongs
)

// table lists the package. What people change is noreplace: an upgrade leaves their file and puts its
// own beside it as .rpmnew.
func (p pack) table() []member {
	return []member{
		dir("/var/lib/kuasar"),
		dir("/usr/share/kuasar"),
		dir("/usr/share/doc/kuasar"),
		dir("/usr/share/licenses/kuasar"),
		// Shared with the package bash-completion, which need not be there.
		dir("/usr/share/bash-completion"),
		dir("/usr/share/bash-completion/completions"),

		program("/usr/bin/vmm-sandboxer", p.Sandboxer),
		program("/usr/bin/kuasar-ctl", p.Ctl),
		// openEuler's documents have the daemon here.
		link("/usr/local/bin/vmm-sandboxer", "../../bin/vmm-sandboxer"),
		// containerd from 2.4 on wants to find a shim of the handler's name, and never runs it.
		link("/usr/bin/containerd-shim-vmm-v1", "vmm-sandboxer"),

		built("/var/lib/kuasar/vmlinux.bin", p.Kernel),
		built("/var/lib/kuasar/kuasar.initrd", p.Initrd),
		config("/var/lib/kuasar/config_stratovirt.toml", p.arch.stratovirt),
		config("/var/lib/kuasar/config_qemu.toml", p.arch.qemu),

		config("/etc/sysconfig/kuasar-vmm", "systemd/kuasar-vmm.sysconfig"),
		plainFile("/usr/lib/systemd/system/kuasar-vmm.service", "systemd/kuasar-vmm.service"),
		plainFile("/usr/lib/systemd/system-preset/90-kuasar.preset", "systemd/90-kuasar.preset"),
		plainFile("/usr/lib/modules-load.d/kuasar.conf", "systemd/kuasar.conf"),

		plainFile("/usr/share/kuasar/containerd.toml", "defaults/containerd.toml"),
		plainFile("/usr/share/kuasar/isulad-daemon.json", "defaults/isulad-daemon.json"),
		plainFile("/usr/share/kuasar/crictl.yaml", "defaults/crictl.yaml"),
		plainFile("/usr/share/kuasar/crictl-isulad.yaml", "defaults/crictl-isulad.yaml"),
		plainFile("/usr/share/kuasar/cni.conflist", "defaults/cni.conflist"),
		plainFile("/usr/share/kuasar/runtimeclass.yaml", "defaults/runtimeclass.yaml"),
		plainFile("/usr/share/kuasar/podsandbox.yaml", "defaults/podsandbox.yaml"),
		plainFile("/usr/share/kuasar/pod-container.yaml", "defaults/pod-container.yaml"),

		manual("/usr/share/man/man8/vmm-sandboxer.8.gz", "defaults/man/vmm-sandboxer.8"),
		manual("/usr/share/man/man1/kuasar-ctl.1.gz", "defaults/man/kuasar-ctl.1"),
		manual("/usr/share/man/man5/config_stratovirt.toml.5.gz", "defaults/man/config_stratovirt.toml.5"),
		plainFile("/usr/share/bash-completion/completions/kuasar-ctl", "defaults/kuasar-ctl.bash"),

		{path: "/usr/share/doc/kuasar/README.md", kind: files.TypeRPMDoc, mode: 0o644, source: "README.md", maker: source},
		{path: "/usr/share/licenses/kuasar/LICENSE", kind: files.TypeRPMLicense, mode: 0o644, source: "LICENSE", maker: source},
	}
}

func dir(path string) member { return member{path: path, kind: files.TypeDir, mode: 0o755} }

func link(path, target string) member {
	return member{path: path, kind: files.TypeSymlink, target: target}
}

func program(path, from string) member {
	return member{path: path, kind: files.TypeFile, mode: 0o755, source: from, maker: made}
}

func built(path, from string) member {
	return member{path: path, kind: files.TypeFile, mode: 0o644, source: from, maker: made}
}

func plainFile(path, from string) member {
	return member{path: path, kind: files.TypeFile, mode: 0o644, source: from, maker: source}
}

func config(path, from string) member {
	return member{path: path, kind: files.TypeConfigNoReplace, mode: 0o644, source: from, maker: source}
}

func manual(path, from string) member {
	return member{path: path, kind: files.TypeRPMDoc, mode: 0o644, source: from, maker: source, pack: compress}
}

// Where what is made with the package is installed: the bill of materials, and the licences of what is in
// the bill.
const (
	bill       = "/usr/share/doc/kuasar/kuasar.spdx.json"
	thirdParty = "/usr/share/licenses/kuasar/THIRD-PARTY"
)

// members resolves the table: every source is then an absolute path of a file that is there and fits
// the architecture. All that is wrong is reported at once.
func (p pack) members() ([]member, error) {
	list := p.table()
	var errs []error
	var parts []part
	for i := range list {
		m := &list[i]
		if m.kind == files.TypeDir || m.kind == files.TypeSymlink {
			continue
		}
		data, err := p.read(*m)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		m.size = int64(len(data))
		parts = append(parts, part{m.path, data})
		// nfpm reads a copy, so that what is packed is what was looked at.
		m.source, err = p.file(strconv.Itoa(i), data)
		if err != nil {
			return nil, err
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	own := func(m member, data []byte) error {
		var err error
		m.mode, m.size = 0o644, int64(len(data))
		m.source, err = p.file(path.Base(m.path), data)
		list = append(list, m)
		return err
	}
	if p.Texts.Modules != "" {
		d, err := p.document(parts)
		if err != nil {
			return nil, err
		}
		text, err := p.Texts.licences(d.Packages)
		if err != nil {
			return nil, err
		}
		parts = append(parts, part{thirdParty, text})
		if err := own(member{path: thirdParty, kind: files.TypeRPMLicense}, text); err != nil {
			return nil, err
		}
	}
	text, err := p.bill(parts)
	if err != nil {
		return nil, err
	}
	return list, own(member{path: bill, kind: files.TypeRPMDoc}, text)
}

// A part is a file as it is packed.
type part struct {
	path string
	data []byte
}

// read returns a member as it is packed.
func (p pack) read(m member) ([]byte, error) {
	from := m.source
	if from == "" {
		return nil, fmt.Errorf("no file is given for %s; %s makes it", m.path, m.maker)
	}
	if !filepath.IsAbs(from) && m.maker == source {
		from = filepath.Join(p.Root, from)
	}
	data, err := os.ReadFile(from)
	switch {
	case errors.Is(err, fs.ErrNotExist) && m.maker == source:
		return nil, fmt.Errorf("%s is missing: it belongs to %s and becomes %s", from, m.maker, m.path)
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s is missing: %q makes it, and it becomes %s", from, p.command(m.maker), m.path)
	case err != nil:
		return nil, err
	case len(data) == 0:
		return nil, fmt.Errorf("%s is empty", from)
	}
	if m.maker == made {
		if err := p.fits(m.path, data); err != nil {
			return nil, fmt.Errorf("%s: %w; %q makes it anew", from, err, p.command(m.maker))
		}
	}
	if m.pack == nil {
		return data, nil
	}
	return m.pack(data)
}

// command is how the files of this architecture are made.
func (p pack) command(verb string) string { return "ARCH=" + p.Arch + " " + verb }

// compress makes the same bytes of the same text, always: neither a name nor a time is recorded.
func compress(data []byte) ([]byte, error) {
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if _, err := z.Write(data); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// contents are members in nfpm's terms.
func contents(members []member, at time.Time) files.Contents {
	var list files.Contents
	for _, m := range members {
		c := &files.Content{
			Source:      m.source,
			Destination: m.path,
			Type:        m.kind,
			FileInfo:    &files.ContentFileInfo{Mode: m.mode, Owner: "root", Group: "root", MTime: at},
		}
		if m.kind == files.TypeSymlink {
			c.Source = m.target
		}
		list = append(list, c)
	}
	return list
}
