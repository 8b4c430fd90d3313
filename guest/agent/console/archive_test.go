package console

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

type member struct {
	name    string
	mode    uint32
	content string
}

// newc packs members as cpio does.
func newc(members ...member) []byte {
	var b bytes.Buffer
	pad := func() {
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	for _, m := range append(members, member{name: trailer}) {
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
			1, m.mode, 0, 0, 1, 0, len(m.content), 0, 0, 0, 0, len(m.name)+1, 0)
		b.WriteString(m.name + "\x00")
		pad()
		b.WriteString(m.content)
		pad()
	}
	return b.Bytes()
}

func packed(b []byte) *bytes.Buffer {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write(b)
	z.Close()
	return &out
}

func unpackTo(t *testing.T, archive *bytes.Buffer) (string, error) {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	return dir, unpack(archive, root)
}

func TestUnpack(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o022)) // as the agent's
	dir, err := unpackTo(t, packed(newc(
		member{".", typeDir | 0o755, ""},
		member{"bin", typeDir | 0o755, ""},
		member{"bin/bb", typeFile | 0o755, "#!binary"},
		member{"bin/ls", typeSymlink | 0o777, "bb"},
		member{"lib/without/parent", typeFile | 0o644, ""},
	)))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "bin/ls")); string(b) != "#!binary" || err != nil {
		t.Errorf("bin/ls: %q, %v", b, err)
	}
	if fi, err := os.Stat(filepath.Join(dir, "bin/bb")); err != nil || fi.Mode() != 0o755 {
		t.Errorf("bin/bb: %v, %v", fi.Mode(), err)
	}
	if _, err := os.Stat(filepath.Join(dir, "lib/without/parent")); err != nil {
		t.Error(err)
	}
}

func TestUnpackStaysInside(t *testing.T) {
	outside := t.TempDir()
	for name, members := range map[string][]member{
		"dots":     {{"../evil", typeFile | 0o644, "x"}},
		"absolute": {{outside + "/evil", typeFile | 0o644, "x"}},
		"link":     {{"d", typeSymlink | 0o777, outside}, {"d/evil", typeFile | 0o644, "x"}},
		"device":   {{"null", 0o020666, ""}},
	} {
		if _, err := unpackTo(t, packed(newc(members...))); err == nil {
			t.Errorf("%s: unpacked", name)
		}
	}
	if left, _ := os.ReadDir(outside); len(left) != 0 {
		t.Errorf("outside there is %v", left)
	}
}

func TestUnpackDamaged(t *testing.T) {
	whole := newc(member{"file", typeFile | 0o644, strings.Repeat("x", 1000)})
	for n := 1; n < len(whole)-200; n += 97 {
		if _, err := unpackTo(t, packed(whole[:n])); err == nil {
			t.Errorf("the first %d bytes were taken for an archive", n)
		}
	}
	for name, b := range map[string][]byte{
		"magic":  bytes.Replace(whole, []byte("070701"), []byte("070707"), 1),
		"number": bytes.Replace(whole, []byte("000003E8"), []byte("zzzzzzzz"), 1),
		"size":   bytes.Replace(whole, []byte("000003E8"), []byte("F00003E8"), 1),
		"name":   bytes.Replace(whole, []byte("00000005"), []byte("00100005"), 1),
	} {
		if bytes.Equal(b, whole) {
			t.Fatalf("%s: nothing was damaged", name)
		}
		if _, err := unpackTo(t, packed(b)); err == nil {
			t.Errorf("%s: unpacked", name)
		}
	}
	if _, err := unpackTo(t, bytes.NewBufferString("no gzip")); err == nil {
		t.Error("unpacked what is not compressed")
	}
}
