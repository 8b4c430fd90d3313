package rpm

import (
	"bytes"
	"compress/gzip"
	"debug/buildinfo"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"regexp"
	"runtime/debug"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
	"kuasar.io/kuasar/guest/initrd"
)

// fits says whether a file that was built is what its path says, for the architecture of the package.
func (p pack) fits(path string, data []byte) error {
	switch path {
	case kernelPath:
		_, err := kernelVersion(data, p.Arch)
		return err
	case initrdPath:
		agent, _, err := unpack(data)
		if err != nil {
			return err
		}
		if err := p.machine(agent); err != nil {
			return fmt.Errorf("its agent: %w", err)
		}
		return nil
	default:
		return p.machine(data)
	}
}

const (
	kernelPath = "/var/lib/kuasar/vmlinux.bin"
	initrdPath = "/var/lib/kuasar/kuasar.initrd"
)

var machines = map[elf.Machine]string{elf.EM_X86_64: "x86_64", elf.EM_AARCH64: "aarch64"}

// machine says whether a program is of the package's architecture.
func (p pack) machine(data []byte) error {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("is no ELF binary: %w", err)
	}
	defer f.Close()
	if machines[f.Machine] != p.Arch {
		return fmt.Errorf("is for %s and not for %s", f.Machine, p.Arch)
	}
	return nil
}

// Where the images of the two architectures have their magic; see Documentation/arch/x86/boot.rst and
// Documentation/arch/arm64/booting.rst of Linux.
const (
	x86Magic, x86MagicAt     = "HdrS", 0x202
	x86Version               = 0x20e // 16 bits: where the version's text is, less 0x200
	arm64Magic, arm64MagicAt = "ARM\x64", 0x38
)

// banner is how a kernel begins to speak, whose text is in every image that is not compressed.
var banner = regexp.MustCompile(`Linux version ([0-9]+\.[0-9]+[^ \x00]*) `)

// kernelVersion returns the release of a kernel image, such as "6.1.192-kuasar".
func kernelVersion(image []byte, arch string) (string, error) {
	at := func(magic string, offset int) bool {
		return len(image) > offset+len(magic) && string(image[offset:offset+len(magic)]) == magic
	}
	isX86, isARM := at(x86Magic, x86MagicAt), at(arm64Magic, arm64MagicAt)
	switch {
	case !isX86 && !isARM:
		return "", errors.New("is neither a bzImage of x86_64 nor an Image of aarch64")
	case isX86 && arch != "x86_64":
		return "", fmt.Errorf("is a kernel for x86_64 and not for %s", arch)
	case isARM && arch != "aarch64":
		return "", fmt.Errorf("is a kernel for aarch64 and not for %s", arch)
	case isARM:
		if m := banner.FindSubmatch(image); m != nil {
			return string(m[1]), nil
		}
		return "", errors.New("is a kernel that does not say its version")
	}
	text := image[min(len(image), int(binary.LittleEndian.Uint16(image[x86Version:]))+0x200):]
	text = text[:min(len(text), 200)]
	version, _, found := bytes.Cut(text, []byte(" "))
	if !found || !bytes.Contains(version, []byte(".")) {
		return "", errors.New("is a kernel that does not say its version")
	}
	return string(version), nil
}

// unpack returns the agent of an initrd, and the program of the debug console's tools, nil if it has none.
func unpack(image []byte) (agent, console []byte, err error) {
	if !bytes.HasPrefix(image, []byte("070701")) {
		return nil, nil, errors.New("is no initrd: it does not begin as a newc archive does")
	}
	agent, err = extract(image, "init")
	if err != nil {
		return nil, nil, fmt.Errorf("is no initrd: %w", err)
	}
	if agent == nil {
		return nil, nil, errors.New("is an initrd without /init")
	}
	archive, err := extract(image, strings.TrimPrefix(initrd.ConsoleArchive, "/"))
	if err != nil || archive == nil {
		return agent, nil, err
	}
	z, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		return nil, nil, fmt.Errorf("%s of the initrd: %w", initrd.ConsoleArchive, err)
	}
	data, err := io.ReadAll(z)
	if err != nil {
		return nil, nil, fmt.Errorf("%s of the initrd: %w", initrd.ConsoleArchive, err)
	}
	console, err = extract(data, "bin/bb")
	if err != nil {
		return nil, nil, fmt.Errorf("%s of the initrd: %w", initrd.ConsoleArchive, err)
	}
	return agent, console, nil
}

// extract returns a file of a newc archive, nil if it is not in there.
func extract(archive []byte, name string) ([]byte, error) {
	reader := cpio.Newc.Reader(bytes.NewReader(archive))
	for {
		record, err := reader.ReadRecord()
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if strings.TrimPrefix(record.Name, "/") == name {
			return io.ReadAll(io.NewSectionReader(record, 0, int64(record.FileSize)))
		}
	}
}

// buildInfo returns what the Go toolchain recorded in a program.
func buildInfo(data []byte) (*debug.BuildInfo, error) {
	return buildinfo.Read(bytes.NewReader(data))
}
