package main

import (
	"bytes"
	"io"
	"os"
	"strings"
	"testing"

	"mvdan.cc/sh/v3/interp"
)

// session runs text as lines and returns what came out. The input is a pipe, because of anything
// but a file the interpreter reads ahead.
func session(t *testing.T, text string, prompt bool) (stdout, stderr string, code int) {
	t.Helper()
	input, feed, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer input.Close()
	if _, err := feed.WriteString(text); err != nil {
		t.Fatal(err)
	}
	feed.Close()
	var out, errs bytes.Buffer
	runner, err := interp.New(interp.StdIO(input, &out, &errs))
	if err != nil {
		t.Fatal(err)
	}
	code, err = lines(runner, oneByte{input}, &out, &errs, prompt)
	if err != nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), code
}

func TestLines(t *testing.T) {
	for _, c := range []struct {
		input, out string
		code       int
	}{
		{"echo one\necho two\n", "one\ntwo\n", 0},
		{"false\necho $?\n", "1\n", 0},
		{"false\n", "", 1},
		{"if true\nthen echo yes\nfi\n", "yes\n", 0},
		{"exit 3\necho no\n", "", 3},
		{"read x\nfrom input\necho got $x\n", "got from input\n", 0},
		{"x=1; cd /\npwd; echo $x\n", "/\n1\n", 0},
		{"", "", 0},
	} {
		out, errs, code := session(t, c.input, false)
		if out != c.out || code != c.code || errs != "" {
			t.Errorf("%q printed %q and %q and ended with %d", c.input, out, errs, code)
		}
	}
}

func TestMistakesDoNotEndTheSession(t *testing.T) {
	out, errs, code := session(t, "foo(\necho on\nno-such-command-here\necho $?\n", false)
	if out != "on\n127\n" || code != 0 || !strings.Contains(errs, "foo(") || !strings.Contains(errs, "no-such-command-here") {
		t.Errorf("printed %q and %q and ended with %d", out, errs, code)
	}
}

func TestPrompt(t *testing.T) {
	out, _, _ := session(t, "echo one\nif true\nthen echo two; fi\n", true)
	if want := "# one\n# > two\n# "; out != want {
		t.Errorf("printed %q, want %q", out, want)
	}
}

// A line is run when it is there, not when the input ends.
func TestEachLineRunsAtOnce(t *testing.T) {
	in, feed := io.Pipe()
	read, out := io.Pipe()
	runner, err := interp.New(interp.StdIO(nil, out, out))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := lines(runner, oneByte{in}, out, out, false)
		ended <- err
	}()
	answer := make([]byte, 16)
	for _, word := range []string{"one", "two"} {
		if _, err := io.WriteString(feed, "echo "+word+"\n"); err != nil {
			t.Fatal(err)
		}
		n, err := io.ReadAtLeast(read, answer, len(word)+1)
		if err != nil || string(answer[:n]) != word+"\n" {
			t.Fatalf("got %q, %v", answer[:n], err)
		}
	}
	feed.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
