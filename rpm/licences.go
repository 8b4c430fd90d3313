package rpm

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// Texts is where the licences of what is linked into the programs are on this machine. The licences of
// most of it demand that they come along with the programs.
type Texts struct {
	// Modules is Go's module cache, which has what the programs were built from ("go env GOMODCACHE").
	Modules string
	// Go is the Go distribution ("go env GOROOT").
	Go string
	// Common has texts by names such as GPL-2; the first of these folders that has one is taken.
	Common []string
}

// CommonTexts are where distributions have texts by name.
var CommonTexts = []string{"/usr/share/common-licenses", "/usr/share/licenses/common-licenses"}

// common are texts of what is not a Go module, by the licence of bill.go.
var common = map[string]string{
	"GPL-2.0-only WITH Linux-syscall-note": "GPL-2",
	"LGPL-2.1-only":                        "LGPL-2.1",
	"LGPL-2.1-or-later":                    "LGPL-2.1",
}

// legal are names of files with licences and what they demand to be kept.
var legal = regexp.MustCompile(`(?i)^([a-z]+_)?(licen[cs]e|copying|copyright|notice|patents)([.-].*)?$`)

// licences makes one text of the licences of all that is in the bill of materials besides the appliance
// itself: each text once, after the names of all that it is for.
func (t Texts) licences(packages []spdxPackage) ([]byte, error) {
	type text struct {
		body  string
		names []string
	}
	var texts []*text
	byDigest := map[[32]byte]*text{}
	add := func(name string, body []byte) {
		digest := sha256.Sum256(bytes.TrimSpace(body))
		known := byDigest[digest]
		if known == nil {
			known = &text{body: string(bytes.TrimSpace(body))}
			byDigest[digest] = known
			texts = append(texts, known)
		}
		known.names = append(known.names, name)
	}
	var absent []string
	for _, p := range packages {
		if p.Supplier == "Organization: "+vendor {
			continue
		}
		name := strings.TrimSpace(p.Name + " " + p.VersionInfo)
		if file, ok := common[p.LicenseDeclared]; ok {
			if body := t.common(file); body != nil {
				add(name+" ("+p.LicenseDeclared+")", body)
			} else {
				absent = append(absent, name+": "+p.LicenseDeclared+", https://spdx.org/licenses/")
			}
			continue
		}
		dir := filepath.Join(t.Modules, escaped(p.Name)+"@"+escaped(p.VersionInfo))
		if p.Name == standardLibrary {
			dir = t.Go
		}
		found, err := legalFiles(dir)
		if err != nil && p.Name == standardLibrary {
			// Distributions that package Go put its licence elsewhere.
			absent = append(absent, "Go "+p.VersionInfo+": BSD-3-Clause, https://go.dev/LICENSE")
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot find the licence of %s, which is linked in: %w", name, err)
		}
		for file, body := range found {
			add(name+", "+file, body)
		}
	}
	var b strings.Builder
	b.WriteString("The licences of what is in the programs, the kernel and the initrd of this package besides Kuasar itself,\nwhose licence is in LICENSE. Versions and checksums are in " + bill + ".\n")
	for _, line := range absent {
		b.WriteString("\nNot here: the text for " + line + "\n")
	}
	for _, t := range texts {
		slices.Sort(t.names)
	}
	slices.SortFunc(texts, func(a, b *text) int { return strings.Compare(a.names[0], b.names[0]) })
	for _, t := range texts {
		b.WriteString("\n" + strings.Repeat("=", 80) + "\n" + strings.Join(t.names, "\n") + "\n" + strings.Repeat("-", 80) + "\n\n" + t.body + "\n")
	}
	return []byte(b.String()), nil
}

func (t Texts) common(name string) []byte {
	for _, dir := range t.Common {
		if body, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
			return body
		}
	}
	return nil
}

// legalFiles returns the contents of the files with licences in a folder.
func legalFiles(dir string) (map[string][]byte, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: \"go mod download\" brings it", dir)
	}
	if err != nil {
		return nil, err
	}
	found := map[string][]byte{}
	for _, e := range entries {
		if e.IsDir() || !legal.MatchString(e.Name()) {
			continue
		}
		if found[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			return nil, err
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s has no file with it", dir)
	}
	return found, nil
}

// escaped is a path or version as the module cache has it: for file systems that do not tell cases
// apart, a capital is "!" and the small letter.
func escaped(name string) string {
	var b strings.Builder
	for _, r := range path.Clean(name) {
		if unicode.IsUpper(r) {
			b.WriteByte('!')
			r = unicode.ToLower(r)
		}
		b.WriteRune(r)
	}
	return b.String()
}
