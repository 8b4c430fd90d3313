package rpm

import (
	"bytes"
	"compress/gzip"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
	"kuasar.io/kuasar/guest/initrd"
)

// archive makes a newc archive of files.
func archive(t *testing.T, files map[string][]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := cpio.Newc.Writer(&b)
	for name, data := range files {
		if err := w.WriteRecord(cpio.StaticFile(name, string(data), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// packed makes parts in which a small program stands in for all of them, so that there are modules to be
// found; its build information is what the bill is compared with.
func packed(t *testing.T) (pack, []part, *debug.BuildInfo) {
	t.Helper()
	program, err := standIn()
	if err != nil {
		t.Fatal(err)
	}
	info, err := buildInfo(program)
	if err != nil {
		t.Fatal(err)
	}
	if len(info.Deps) < len(linked) {
		t.Fatalf("the program has %d modules in it; it cannot stand in for anything", len(info.Deps))
	}
	var console bytes.Buffer
	z := gzip.NewWriter(&console)
	if _, err := z.Write(archive(t, map[string][]byte{"bin/bb": program})); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	image := archive(t, map[string][]byte{"init": program, strings.TrimPrefix(initrd.ConsoleArchive, "/"): console.Bytes()})
	root := t.TempDir()
	gomod := filepath.Join(root, "guest/initrd/console/go.mod")
	if err := os.MkdirAll(filepath.Dir(gomod), 0o755); err != nil {
		t.Fatal(err)
	}
	text := "module example.org/console\n\ngo 1.26.0\n\nrequire (\n\tgithub.com/vishvananda/netns v0.99.0\n\texample.org/not/linked v1.0.0 // indirect\n)\n\nrequire golang.org/x/sys v0.1.99\n\ntool github.com/u-root/u-root/cmds/core/ls\n"
	if err := os.WriteFile(gomod, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := pack{
		Options: Options{Root: root, Arch: hostArch(), Commit: "0123456789ab", Time: epoch, Libraries: []Library{
			{Name: "glibc", Version: "2.36-9", Licence: "LGPL-2.1-or-later", Package: "pkg:deb/debian/libc6-dev@2.36-9"},
			{Name: "libseccomp"},
		}},
		arch: architectures[hostArch()], evr: "0.1.0~dev-1",
	}
	return p, []part{
		{"/usr/bin/vmm-sandboxer", program},
		{kernelPath, kernelImage(hostArch(), "6.1.9-kuasar")},
		{initrdPath, image},
		{"/etc/sysconfig/kuasar-vmm", []byte("OPTIONS=\n")},
	}, info
}

func decode(t *testing.T, text []byte) spdxDocument {
	t.Helper()
	var d spdxDocument
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&d); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestBillOfMaterials(t *testing.T) {
	p, parts, info := packed(t)
	text, err := p.bill(parts)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := p.bill(parts); err != nil || !bytes.Equal(again, text) {
		t.Errorf("another bill of the same parts (%v)", err)
	}
	d := decode(t, text)
	checkSPDX(t, d)

	inside := func(element string) (list []string) {
		for _, r := range d.Relationships {
			if r.Element == element && r.Type == staticLink {
				i := slices.IndexFunc(d.Packages, func(p spdxPackage) bool { return p.SPDXID == r.Related })
				list = append(list, d.Packages[i].Name+"@"+d.Packages[i].VersionInfo)
			}
		}
		return list
	}
	for _, element := range []string{"SPDXRef-File-usr-bin-vmm-sandboxer", "SPDXRef-Package-vmm-task"} {
		have := inside(element)
		for _, m := range info.Deps {
			if !slices.Contains(have, m.Path+"@"+m.Version) {
				t.Errorf("%s lacks %s@%s", element, m.Path, m.Version)
			}
		}
		if std := "stdlib@" + strings.TrimPrefix(info.GoVersion, "go"); !slices.Contains(have, std) {
			t.Errorf("%s lacks %s: %v", element, std, have)
		}
		if slices.ContainsFunc(have, func(m string) bool { return strings.HasPrefix(m, "glibc@") }) {
			t.Errorf("%s has a C library: %v", element, have)
		}
	}
	console := inside("SPDXRef-Package-kuasar-console")
	if !slices.Contains(console, "github.com/vishvananda/netns@v0.99.0") || !slices.Contains(console, "golang.org/x/sys@v0.1.99") {
		t.Errorf("the console has %v", console)
	}
	if slices.ContainsFunc(console, func(m string) bool { return strings.HasPrefix(m, "example.org/") }) {
		t.Errorf("the console has a module that is not linked into it: %v", console)
	}
	i := slices.IndexFunc(d.Packages, func(p spdxPackage) bool { return p.Name == "linux" })
	if i < 0 || d.Packages[i].VersionInfo != "6.1.9" || !strings.Contains(d.Packages[i].Comment, "6.1.9-kuasar") {
		t.Error("the kernel's version is not there")
	}
	if !slices.Contains(d.Relationships, spdxRelationship{"SPDXRef-File-var-lib-kuasar-vmlinux.bin", generatedBy, "SPDXRef-Package-linux"}) {
		t.Error("the kernel's image is not made of Linux")
	}
	for i, part := range parts {
		sum := sha256.Sum256(part.data)
		if d.Files[i].FileName != "."+part.path || !slices.Contains(d.Files[i].Checksums, spdxChecksum{"SHA256", hex.EncodeToString(sum[:])}) {
			t.Errorf("%s: %+v", part.path, d.Files[i])
		}
	}

	// Other contents are another document.
	parts[3].data = []byte("OPTIONS=-v\n")
	other, err := p.bill(parts)
	if err != nil {
		t.Fatal(err)
	}
	if decode(t, other).DocumentNamespace == d.DocumentNamespace {
		t.Error("two documents have one namespace")
	}
}

var (
	spdxID   = regexp.MustCompile(`^SPDXRef-[A-Za-z0-9.-]+$`)
	sha1RE   = regexp.MustCompile(`^[0-9a-f]{40}$`)
	sha256RE = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// checkSPDX checks what SPDX 2.3 demands of a document.
func checkSPDX(t *testing.T, d spdxDocument) {
	t.Helper()
	if d.SPDXVersion != "SPDX-2.3" || d.DataLicense != "CC0-1.0" || d.SPDXID != "SPDXRef-DOCUMENT" || d.Name == "" {
		t.Errorf("the document is %q, %q, %q, %q", d.SPDXVersion, d.DataLicense, d.SPDXID, d.Name)
	}
	if !strings.HasPrefix(d.DocumentNamespace, "https://") || strings.Contains(d.DocumentNamespace, "#") {
		t.Errorf("the namespace is %q", d.DocumentNamespace)
	}
	if created, err := time.Parse("2006-01-02T15:04:05Z", d.CreationInfo.Created); err != nil || !created.Equal(epoch) {
		t.Errorf("created %q: %v", d.CreationInfo.Created, err)
	}
	if !slices.ContainsFunc(d.CreationInfo.Creators, func(c string) bool { return strings.HasPrefix(c, "Tool: ") }) {
		t.Errorf("created by %v", d.CreationInfo.Creators)
	}
	ids := map[string]bool{d.SPDXID: true}
	unique := func(id string) {
		if !spdxID.MatchString(id) || ids[id] {
			t.Errorf("the id %q is not one, or there twice", id)
		}
		ids[id] = true
	}
	licensed := func(id string, texts ...string) {
		if slices.Contains(texts, "") {
			t.Errorf("%s: a mandatory text is missing", id)
		}
	}
	for _, p := range d.Packages {
		unique(p.SPDXID)
		licensed(p.SPDXID, p.Name, p.DownloadLocation, p.LicenseConcluded, p.LicenseDeclared, p.CopyrightText)
		if p.FilesAnalyzed != (p.VerificationCode != nil) {
			t.Errorf("%s: files are analyzed or not, and the verification code must tell", p.SPDXID)
		}
		for _, r := range p.ExternalRefs {
			if (r.Type == "purl") != strings.HasPrefix(r.Locator, "pkg:") || r.Category == "" {
				t.Errorf("%s: %+v", p.SPDXID, r)
			}
		}
	}
	var digests []string
	for _, f := range d.Files {
		unique(f.SPDXID)
		licensed(f.SPDXID, f.FileName, f.LicenseConcluded, f.CopyrightText)
		if !strings.HasPrefix(f.FileName, "./") || len(f.LicenseInfo) == 0 {
			t.Errorf("%+v", f)
		}
		if len(f.Checksums) != 2 || f.Checksums[0].Algorithm != "SHA1" || !sha1RE.MatchString(f.Checksums[0].Value) ||
			f.Checksums[1].Algorithm != "SHA256" || !sha256RE.MatchString(f.Checksums[1].Value) {
			t.Errorf("%s: %v", f.FileName, f.Checksums)
			continue
		}
		digests = append(digests, f.Checksums[0].Value)
	}
	slices.Sort(digests)
	code := sha1.Sum([]byte(strings.Join(digests, "")))
	described := 0
	for _, r := range d.Relationships {
		if !ids[r.Element] || !ids[r.Related] {
			t.Errorf("%+v is of elements that are not there", r)
		}
		if r.Element == d.SPDXID && r.Type == "DESCRIBES" {
			described++
			i := slices.IndexFunc(d.Packages, func(p spdxPackage) bool { return p.SPDXID == r.Related })
			v := d.Packages[i].VerificationCode
			if v.Value != hex.EncodeToString(code[:]) || !slices.Equal(v.Excluded, []string{"." + bill}) {
				t.Errorf("the verification code is %+v", v)
			}
		}
	}
	if described != 1 || len(d.DocumentDescribes) != 1 {
		t.Errorf("%d packages are described", described)
	}
	// Every element but the document is the object of something.
	for id := range ids {
		if id != d.SPDXID && !slices.ContainsFunc(d.Relationships, func(r spdxRelationship) bool { return r.Related == id }) {
			t.Errorf("nothing leads to %s", id)
		}
	}
}

func TestBillOfWhatIsUnknown(t *testing.T) {
	p, parts, _ := packed(t)
	if err := os.Remove(filepath.Join(p.Root, "guest/initrd/console/go.mod")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.bill(parts); err == nil || !strings.Contains(err.Error(), "console/go.mod is missing") {
		t.Errorf("without the console's go.mod: %v", err)
	}
	parts[2] = part{"/usr/bin/kuasar-ctl", elfHead(0)}
	if _, err := p.bill(parts); err == nil || !strings.Contains(err.Error(), "/usr/bin/kuasar-ctl: cannot read what it was built from") {
		t.Errorf("with a program that is not Go's: %v", err)
	}
}

// The agent is the one with C libraries in it.
func TestBillOfCLibraries(t *testing.T) {
	p, parts, _ := packed(t)
	program, err := compile("CGO_ENABLED=1")
	if err != nil {
		t.Fatal(err)
	}
	parts[2].data = archive(t, map[string][]byte{"init": program})
	text, err := p.bill(parts)
	if err != nil {
		t.Fatal(err)
	}
	d := decode(t, text)
	checkSPDX(t, d)
	for _, name := range []string{"glibc", "libseccomp"} {
		if !slices.Contains(d.Relationships, spdxRelationship{"SPDXRef-Package-vmm-task", staticLink, "SPDXRef-Package-c-" + name}) {
			t.Errorf("%s is not said to be linked into the agent", name)
		}
		i := slices.IndexFunc(d.Packages, func(p spdxPackage) bool { return p.Name == name })
		if known := d.Packages[i].VersionInfo != ""; known == strings.Contains(d.Packages[i].Comment, "could not tell") {
			t.Errorf("%+v", d.Packages[i])
		}
	}
}
