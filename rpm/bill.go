package rpm

import (
	"bytes"
	"cmp"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"
)

// bill makes the bill of materials, in SPDX 2.3, from what is packed: the modules that the Go toolchain
// recorded in each program, also in those inside of the initrd, the release that the kernel says it is,
// and the digest of every file but its own.
func (p pack) bill(parts []part) ([]byte, error) {
	d, err := p.document(parts)
	if err != nil {
		return nil, fmt.Errorf("cannot make the bill of materials: %w", err)
	}
	text, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(text, '\n'), nil
}

func (p pack) document(parts []part) (spdxDocument, error) {
	b := biller{ids: map[string]string{}, packages: map[string]spdxPackage{}}
	root := b.add("kuasar", spdxPackage{
		Name: Name, VersionInfo: p.evr, Supplier: "Organization: " + vendor,
		PackageFileName:  fmt.Sprintf("%s-%s.%s.rpm", Name, p.evr, p.Arch),
		DownloadLocation: noAssertion, FilesAnalyzed: true,
		VerificationCode: verification(parts),
		LicenseConcluded: noAssertion, LicenseDeclared: licences, CopyrightText: noAssertion,
		SourceInfo:   sourceInfo(p.Commit),
		ExternalRefs: purl(fmt.Sprintf("pkg:rpm/%s@%s?arch=%s", Name, p.evr, p.Arch)),
		Purpose:      "APPLICATION",
	})
	b.relate(spdxDocID, describes, root)
	for _, part := range parts {
		file := b.file(part)
		b.relate(root, contains, file)
		var err error
		switch {
		case part.path == kernelPath:
			err = p.kernel(&b, file, part.data)
		case part.path == initrdPath:
			err = p.initrd(&b, file, part.data)
		case strings.HasPrefix(part.path, "/usr/bin/"):
			err = p.program(&b, file, part.data)
		}
		if err != nil {
			return spdxDocument{}, fmt.Errorf("%s: %w", part.path, err)
		}
	}
	d := spdxDocument{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", SPDXID: spdxDocID,
		Name: fmt.Sprintf("%s-%s.%s", Name, p.evr, p.Arch),
		CreationInfo: spdxCreation{
			Created:  p.Time.UTC().Format(time.RFC3339),
			Creators: []string{"Organization: " + vendor, "Tool: kuasar-rpm"},
		},
		DocumentDescribes: []string{root},
		Files:             b.files,
		Relationships:     b.relationships,
	}
	d.Packages = slices.SortedFunc(values(b.packages), func(a, b spdxPackage) int { return cmp.Compare(a.SPDXID, b.SPDXID) })
	// A namespace must be of this document only, so it ends in a digest of what the document is about.
	text, err := json.Marshal(d)
	if err != nil {
		return spdxDocument{}, err
	}
	sum := sha256.Sum256(text)
	d.DocumentNamespace = fmt.Sprintf("%s/spdx/%s-%s", homepage, d.Name, hex.EncodeToString(sum[:16]))
	return d, nil
}

func values(m map[string]spdxPackage) func(func(spdxPackage) bool) {
	return func(yield func(spdxPackage) bool) {
		for _, v := range m {
			if !yield(v) {
				return
			}
		}
	}
}

func sourceInfo(commit string) string {
	if commit == "" {
		return "built from a source whose commit is not known"
	}
	return "built from commit " + commit
}

// program adds what is linked into a Go program.
func (p pack) program(b *biller, element string, data []byte) error {
	info, err := buildInfo(data)
	if err != nil {
		return fmt.Errorf("cannot read what it was built from: %w", err)
	}
	b.standardLibrary(element, info)
	for _, m := range info.Deps {
		// What is replaced by a folder keeps its name.
		if m.Replace != nil && m.Replace.Version != "" {
			m = m.Replace
		}
		b.module(element, m)
	}
	if slices.Contains(info.Settings, debug.BuildSetting{Key: "CGO_ENABLED", Value: "1"}) {
		for _, l := range p.Libraries {
			b.relate(element, staticLink, b.add("c-"+l.Name, l.pack()))
		}
	}
	return nil
}

// initrd adds the programs that are in the initrd.
func (p pack) initrd(b *biller, file string, image []byte) error {
	agent, console, err := unpack(image)
	if err != nil {
		return err
	}
	own := func(name, comment string, data []byte) string {
		return b.add(name, spdxPackage{
			Name: name, VersionInfo: p.evr, Supplier: "Organization: " + vendor, DownloadLocation: noAssertion,
			Checksums:        sums(data),
			LicenseConcluded: noAssertion, LicenseDeclared: noAssertion, CopyrightText: noAssertion,
			SourceInfo: sourceInfo(p.Commit), Comment: comment, Purpose: "APPLICATION",
		})
	}
	element := own("vmm-task", "The guest's agent, /init of the initrd.", agent)
	b.relate(file, contains, element)
	if err := p.program(b, element, agent); err != nil {
		return fmt.Errorf("the agent: %w", err)
	}
	if console == nil {
		return nil
	}
	element = own("kuasar-console", "The tools of the guest's debug console, in one program.", console)
	b.relate(file, contains, element)
	return p.console(b, element, console)
}

// console adds what is linked into the console's program. u-root compiles it outside of modules, so that
// the toolchain records none; their versions are those of the go.mod that it is built with, as far as
// functions of them are in it.
func (p pack) console(b *biller, element string, data []byte) error {
	info, err := buildInfo(data)
	if err != nil {
		return fmt.Errorf("the console: cannot read what it was built from: %w", err)
	}
	b.standardLibrary(element, info)
	gomod := filepath.Join(p.Root, "guest/initrd/console/go.mod")
	text, err := os.ReadFile(gomod)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the console: %s is missing, which says what it was built from", gomod)
	}
	if err != nil {
		return err
	}
	for _, m := range required.FindAllSubmatch(text, -1) {
		name := string(m[1])
		if bytes.Contains(data, []byte(name+"/")) || bytes.Contains(data, []byte(name+".")) {
			b.module(element, &debug.Module{Path: name, Version: string(m[2])})
		}
	}
	return nil
}

// required is a line of go.mod that requires a module.
var required = regexp.MustCompile(`(?m)^(?:require)?\s+([^\s()]+\.[^\s()]+)\s+(v[^\s]+)`)

// kernel adds what the kernel was built from.
func (p pack) kernel(b *biller, file string, image []byte) error {
	release, err := kernelVersion(image, p.Arch)
	if err != nil {
		return err
	}
	// What follows the version is the builder's own.
	version, _, _ := strings.Cut(release, "-")
	b.relate(file, generatedBy, b.add("linux", spdxPackage{
		Name: "linux", VersionInfo: version, Supplier: "Organization: The Linux kernel", DownloadLocation: "https://www.kernel.org/",
		LicenseConcluded: noAssertion, LicenseDeclared: "GPL-2.0-only WITH Linux-syscall-note", CopyrightText: noAssertion,
		Comment: "The guest's kernel, release " + release + ", built from a distribution's source of this version.",
		ExternalRefs: append(purl("pkg:generic/linux@"+version), spdxReference{
			Category: "SECURITY", Type: "cpe23Type", Locator: "cpe:2.3:o:linux:linux_kernel:" + version + ":*:*:*:*:*:*:*",
		}),
		Purpose: "OPERATING-SYSTEM",
	}))
	return nil
}

// biller collects a document. Elements are added in the order of the parts, so that the same parts make
// the same document.
type biller struct {
	ids           map[string]string // key of a package to its id
	packages      map[string]spdxPackage
	files         []spdxFile
	relationships []spdxRelationship
}

// add adds a package unless there is one of the same key, and returns its id.
func (b *biller) add(key string, p spdxPackage) string {
	if id, ok := b.ids[key]; ok {
		return id
	}
	p.SPDXID = b.id("Package-" + key)
	b.ids[key] = p.SPDXID
	b.packages[p.SPDXID] = p
	return p.SPDXID
}

// unfit are the characters that an id must not have.
var unfit = regexp.MustCompile(`[^A-Za-z0-9.-]+`)

func (b *biller) id(name string) string {
	return "SPDXRef-" + strings.Trim(unfit.ReplaceAllString(name, "-"), "-")
}

func (b *biller) file(p part) string {
	id := b.id("File-" + strings.TrimPrefix(p.path, "/"))
	b.files = append(b.files, spdxFile{
		SPDXID: id, FileName: "." + p.path, Checksums: sums(p.data),
		LicenseConcluded: noAssertion, LicenseInfo: []string{noAssertion}, CopyrightText: noAssertion,
	})
	return id
}

// standardLibrary is the name by which scanners know it.
const standardLibrary = "stdlib"

// standardLibrary adds Go's own library.
func (b *biller) standardLibrary(element string, info *debug.BuildInfo) {
	version := strings.TrimPrefix(info.GoVersion, "go")
	b.relate(element, staticLink, b.add("go-stdlib-"+version, golang(standardLibrary, version, "")))
}

func (b *biller) module(element string, m *debug.Module) {
	b.relate(element, staticLink, b.add("go-"+m.Path+"-"+m.Version, golang(m.Path, m.Version, m.Sum)))
}

func (b *biller) relate(element, kind, related string) {
	b.relationships = append(b.relationships, spdxRelationship{element, kind, related})
}

func golang(name, version, sum string) spdxPackage {
	p := spdxPackage{
		Name: name, VersionInfo: version, DownloadLocation: noAssertion,
		LicenseConcluded: noAssertion, LicenseDeclared: noAssertion, CopyrightText: noAssertion,
		// Package URLs have modules in lower case.
		ExternalRefs: purl("pkg:golang/" + strings.ToLower(name) + "@" + strings.ReplaceAll(version, "+", "%2B")),
		Purpose:      "LIBRARY",
	}
	if sum != "" {
		p.Comment = "go.sum: " + sum
	}
	return p
}

func purl(locator string) []spdxReference {
	return []spdxReference{{Category: purlCategory, Type: purlType, Locator: locator}}
}

func sums(data []byte) []spdxChecksum {
	// SPDX 2.3 wants SHA-1 of files, whatever else there is.
	s1, s256 := sha1.Sum(data), sha256.Sum256(data)
	return []spdxChecksum{
		{"SHA1", hex.EncodeToString(s1[:])},
		{"SHA256", hex.EncodeToString(s256[:])},
	}
}

// verification is the digest of all files but the bill itself: SHA-1 of their sorted SHA-1.
func verification(parts []part) *spdxVerification {
	var digests []string
	for _, p := range parts {
		sum := sha1.Sum(p.data)
		digests = append(digests, hex.EncodeToString(sum[:]))
	}
	slices.Sort(digests)
	sum := sha1.Sum([]byte(strings.Join(digests, "")))
	return &spdxVerification{Value: hex.EncodeToString(sum[:]), Excluded: []string{"." + bill}}
}

// A Library is a C library that is linked into a program.
type Library struct {
	Name    string // as its project has it
	Version string // empty if it is not known
	Licence string // SPDX
	Package string // package URL of what it came from, empty if it is not known
}

func (l Library) pack() spdxPackage {
	p := spdxPackage{
		Name: l.Name, VersionInfo: l.Version, DownloadLocation: noAssertion,
		LicenseConcluded: noAssertion, LicenseDeclared: cmp.Or(l.Licence, noAssertion), CopyrightText: noAssertion,
		Purpose: "LIBRARY",
	}
	if l.Package != "" {
		p.ExternalRefs = purl(l.Package)
	}
	if l.Version == "" {
		p.Comment = "The machine that built this could not tell the version."
	}
	return p
}
