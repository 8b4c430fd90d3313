package disk

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFilesystem(t *testing.T) {
	image := func(at int, magic string) []byte {
		b := make([]byte, 4096)
		copy(b[at:], magic)
		return b
	}
	for name, c := range map[string]struct {
		content    []byte
		want, fail string
	}{
		"ext4":      {image(1080, "\x53\xef"), "ext4", ""},
		"erofs":     {image(1024, "\xe2\xe1\xf5\xe0"), "erofs", ""},
		"zeroes":    {image(0, ""), "", "neither"},
		"empty":     {nil, "", "only 0 bytes"},
		"truncated": {image(1024, "\xe2\xe1\xf5\xe0")[:1030], "", "only 1030 bytes"},
		"disk":      {image(510, "\x55\xaa"), "", "partitions"},
		"qcow2":     {image(0, "QFI\xfb"), "", "qemu-img convert"},
	} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := Filesystem(path)
		if got != c.want || c.fail == "" && err != nil || c.fail != "" && (err == nil || !strings.Contains(err.Error(), c.fail)) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, err := Filesystem("/nonexistent"); err == nil {
		t.Error("there is no such file")
	}
}
