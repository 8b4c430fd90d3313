package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLogs(t *testing.T) {
	base := t.TempDir()
	dir := state(t, base, "pod1", nil)
	if _, errs, status := ctl(t, "--dir", base, "logs", "pod1"); status != exitFailed || !strings.Contains(errs, "has no console log") {
		t.Errorf("without a log: status %d, %s", status, errs)
	}
	log := filepath.Join(dir, "sandbox-pod1.log")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(log, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("one\r\ntwo\x1b[31mred\x1b[0m\nthree")
	for _, test := range []struct {
		args []string
		want string
	}{
		{nil, "one\ntwored\nthree"},
		{[]string{"-n", "1"}, "three"},
		{[]string{"-n", "2"}, "twored\nthree"},
		{[]string{"-n", "9"}, "one\ntwored\nthree"},
		{[]string{"-n", "0"}, ""},
		{[]string{"--raw", "-n", "2"}, "two\x1b[31mred\x1b[0m\nthree"},
		{[]string{"-o", "json"}, "{\"pod\":\"pod1\",\"line\":\"one\"}\n{\"pod\":\"pod1\",\"line\":\"twored\"}\n{\"pod\":\"pod1\",\"line\":\"three\"}\n"},
	} {
		if out, errs, status := ctl(t, append([]string{"--dir", base, "logs", "pod1"}, test.args...)...); status != 0 || out != test.want {
			t.Errorf("%q: %q, status %d, %s", test.args, out, status, errs)
		}
	}
	write("\na\n")
	if out, _, _ := ctl(t, "--dir", base, "logs", "-n", "2", "pod1"); out != "\na\n" {
		t.Errorf("two lines of two: %q", out)
	}
	if out, _, _ := ctl(t, "--dir", base, "logs", "-n", "1", "pod1"); out != "a\n" {
		t.Errorf("one line of two: %q", out)
	}
	write("")
	if out, _, status := ctl(t, "--dir", base, "logs", "-n", "2", "pod1"); out != "" || status != 0 {
		t.Errorf("an empty log: %q", out)
	}
}

// writer writes a log as the daemon does: it appends, and shortens the file in place.
type writer struct {
	t *testing.T
	f *os.File
}

func (w *writer) print(s string) {
	w.t.Helper()
	if _, err := w.f.WriteString(s); err != nil {
		w.t.Fatal(err)
	}
}

// cut keeps what begins with from, if it is there, behind the remark; first is called between the two steps.
func (w *writer) cut(from string, first func()) {
	w.t.Helper()
	content, err := os.ReadFile(w.f.Name())
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.f.Truncate(0); err != nil {
		w.t.Fatal(err)
	}
	first()
	kept := ""
	if i := bytes.Index(content, []byte(from)); i >= 0 {
		kept = string(content[i:])
	}
	w.print("[earlier output was dropped]\n" + kept)
}

func TestFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := &writer{t, f}
	var out bytes.Buffer
	tail := &tail{path: path, out: &out}
	lines := 0
	count := func(n int) {
		for range n {
			w.print(fmt.Sprintf("line %d\n", lines))
			lines++
		}
	}
	look := func() {
		t.Helper()
		if gone, err := tail.look(); gone || err != nil {
			t.Fatal(gone, err)
		}
	}
	count(500)
	if err := tail.begin(-1); err != nil {
		t.Fatal(err)
	}
	count(1)
	look()
	// Shortened, and more printed before the next look.
	w.cut("line 250\n", look)
	count(2)
	look()
	look()
	// Shortened and grown beyond what it was.
	w.cut("line 300\n", func() {})
	count(1000)
	look()
	look()
	// The rest of a line comes later.
	w.print("line ")
	look()
	w.print(fmt.Sprintf("%d\n", lines))
	lines++
	look()
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	if out.String() != want.String() {
		t.Errorf("%d lines of %d; the end is %q", strings.Count(out.String(), "\n"), lines, out.String()[max(0, out.Len()-200):])
	}

	// Everything that was shown has been dropped: nothing can be known of what was between.
	out.Reset()
	w.cut("nothing of it", func() {})
	w.print("new\n")
	look()
	look()
	if out.String() != "[earlier output was dropped]\nnew\n" {
		t.Errorf("%q", out.String())
	}

	// Another file in its place, and then none.
	out.Reset()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	w.print("last\n")
	if err := os.WriteFile(path, []byte("first\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	look()
	if out.String() != "last\nfirst\n" {
		t.Errorf("%q", out.String())
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := tail.follow(t.Context(), func() bool { t.Error("it waits for a file that is gone"); return false }); err != nil {
		t.Error(err)
	}
}

func TestFollowIsEnded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("a\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	tail := &tail{path: path, out: &out}
	if err := tail.begin(0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := tail.follow(ctx, func() bool { return false }); !errors.Is(err, context.Canceled) || out.Len() > 0 {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func TestCleaner(t *testing.T) {
	const text = "a\x1b[1;31mb\x1b]0;title\x07c\x1b]0;t\x1b\\d\x1bMe\rf\x00\x7fg\th\n\xc3\xa4\xe2\x82\xac\xc2\x9b31m\xffz\x1b[2\nnext\x1bPq\nend"
	const want = "abcdefg\th\nä€31mz\nnext\nend"
	for _, size := range []int{1, 2, 3, 7, len(text)} {
		var out bytes.Buffer
		c := &cleaner{w: &out}
		for rest := text; rest != ""; {
			n := min(size, len(rest))
			if _, err := c.Write([]byte(rest[:n])); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if out.String() != want {
			t.Errorf("by %d bytes: %q", size, out.String())
		}
	}
}

func TestJSONLinesAreBounded(t *testing.T) {
	var out bytes.Buffer
	j := &jsonLines{call: &call{streams: streams{out: &out}}, pod: "p"}
	if _, err := j.Write(bytes.Repeat([]byte("x"), 3*maxLine/2)); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "\n"); n != 1 || len(j.part) > maxLine {
		t.Errorf("%d lines, %d bytes are kept", n, len(j.part))
	}
}
