package pod

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"kuasar.io/kuasar/sandboxer/vm"
)

// How much of the guest's console goes into an error.
const (
	tailLines = 10
	tailWidth = 160
)

// consoleTail returns the last lines of the guest's console, fit to stand in an error: the guest
// decides what they say, but neither how many there are nor which control characters they carry.
func consoleTail(m vm.Machine, dir, id string) []string {
	var lines []string
	if c, ok := m.(console); ok {
		lines = c.ConsoleTail()
	}
	if len(lines) == 0 {
		lines = fileTail(filepath.Join(dir, "sandbox-"+id+".log"))
	}
	var tail []string
	for _, l := range lines {
		if l = plain(l); l != "" {
			tail = append(tail, l)
		}
	}
	return tail[max(0, len(tail)-tailLines):]
}

// plain drops escape sequences and control characters and shortens the line.
func plain(line string) string {
	var b strings.Builder
	for i := 0; i < len(line) && b.Len() < tailWidth; {
		if line[i] == 0x1b {
			i = skipEscape(line, i+1)
			continue
		}
		r, n := utf8.DecodeRuneInString(line[i:])
		i += n
		switch {
		case r == '\t':
			b.WriteByte(' ')
		case r < ' ', r == 0x7f, r == utf8.RuneError:
		default:
			b.WriteRune(r)
		}
	}
	return strings.TrimSpace(b.String())
}

// skipEscape returns the index behind the escape sequence whose ESC stands before i.
func skipEscape(s string, i int) int {
	if i >= len(s) || s[i] != '[' {
		return min(i+1, len(s))
	}
	for i++; i < len(s); i++ {
		if s[i] >= 0x40 && s[i] <= 0x7e {
			return i + 1
		}
	}
	return i
}

// fileTail returns the lines in the last 8 KiB of a file; none if it cannot be read.
func fileTail(path string) []string {
	const window = 8 << 10
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > window {
		if _, err := f.Seek(-window, io.SeekEnd); err != nil {
			return nil
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, window))
	if err != nil {
		return nil
	}
	return strings.Split(string(b), "\n")
}
