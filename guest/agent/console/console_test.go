package console

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// serve starts a console with the host's shell and returns how to open a session.
func serve(t *testing.T) func() *net.UnixConn {
	t.Helper()
	if _, err := os.Stat("/bin/sh"); err != nil {
		t.Skip("needs /bin/sh")
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go (&Console{Shell: "/bin/sh", Log: slog.New(slog.DiscardHandler)}).Serve(l)
	return func() *net.UnixConn {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(20 * time.Second))
		return c.(*net.UnixConn)
	}
}

func TestScriptHasNoEchoAndNoPrompt(t *testing.T) {
	c := serve(t)()
	io.WriteString(c, "KSR_MODE exec\nx=5\necho $((x+1))\necho err >&2\nfalse\necho $?\n")
	c.CloseWrite()
	b, err := io.ReadAll(c)
	if got := string(b); got != "6\nerr\n1\n" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// A client that waits for each answer, and whose first line comes in pieces.
func TestScriptAnswersLineByLine(t *testing.T) {
	c := serve(t)()
	io.WriteString(c, "KSR_MODE ")
	io.WriteString(c, "exec\n")
	for _, word := range []string{"one", "two"} {
		io.WriteString(c, "echo "+word+"\n")
		b := make([]byte, len(word)+1)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != word+"\n" {
			t.Fatalf("%q, %v", b, err)
		}
	}
	io.WriteString(c, "exit 3\n")
	if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
		t.Errorf("after exit: %q, %v", b, err)
	}
}

func TestMuchOutputArrivesWhole(t *testing.T) {
	c := serve(t)()
	io.WriteString(c, "KSR_MODE exec\nhead -c 3000000 /dev/zero\n")
	c.CloseWrite()
	if n, err := io.Copy(io.Discard, c); n != 3_000_000 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestBackgroundJobDoesNotHoldTheConsole(t *testing.T) {
	c := serve(t)()
	io.WriteString(c, "KSR_MODE exec\nsleep 100 &\necho $!\n")
	c.CloseWrite()
	b, err := io.ReadAll(c)
	pid, nerr := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || nerr != nil {
		t.Fatalf("%q, %v", b, err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Errorf("the job is gone: %v", err)
	}
}

func TestInteractive(t *testing.T) {
	if f, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0); err != nil {
		t.Skipf("needs /dev/ptmx: %v", err)
	} else {
		f.Close()
	}
	open := serve(t)
	c := open()
	io.WriteString(c, "test -t 0 && echo term$((1+1))nal\nexit\n")
	b, err := io.ReadAll(c)
	if !bytes.Contains(b, []byte("term2nal")) || err != nil {
		t.Errorf("%q, %v", b, err)
	}

	// The session ends with its client, also when something runs that does not look at its input.
	c = open()
	io.WriteString(c, "echo pid-$$-; exec sleep 1000\n")
	var seen []byte
	var pid int
	for pid == 0 {
		buf := make([]byte, 512)
		n, err := c.Read(buf)
		if err != nil {
			t.Fatalf("%q, %v", seen, err)
		}
		seen = append(seen, buf[:n]...)
		for _, part := range bytes.Split(seen, []byte("pid-")) {
			if num, _, ok := bytes.Cut(part, []byte("-\r\n")); ok {
				pid, _ = strconv.Atoi(string(num))
			}
		}
	}
	c.Close()
	deadline := time.Now().Add(10 * time.Second)
	for !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
		if time.Now().After(deadline) {
			syscall.Kill(pid, syscall.SIGKILL)
			t.Fatal("the session survived its client")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A client whose input is a file, as in: printf '...' | ncat --vsock 3 1025. It has sent everything
// long before the shell is through with it, and reads on.
func TestInteractiveWithInputFromAFile(t *testing.T) {
	if f, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0); err != nil {
		t.Skipf("needs /dev/ptmx: %v", err)
	} else {
		f.Close()
	}
	c := serve(t)()
	io.WriteString(c, "sleep 1.5; echo fir$((0))st\necho seco$((0))nd\n")
	c.CloseWrite()
	b, err := io.ReadAll(c)
	if !bytes.Contains(b, []byte("fir0st")) || !bytes.Contains(b, []byte("seco0nd")) || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

func TestReadMode(t *testing.T) {
	for sent, want := range map[string]struct {
		script bool
		head   string
	}{
		"KSR_MODE exec\nls\n":   {true, "ls\n"},
		"KSR_MODE exec\r\nls\n": {true, "ls\n"},
		"ls\n":                  {false, "ls\n"},
		"KSR_MODE exe":          {false, "KSR_MODE exe"},
		"":                      {false, ""},
		"KSR_MODE execute\n":    {false, "KSR_MODE execute\n"},
	} {
		a, b := net.Pipe()
		go io.WriteString(b, sent)
		script, head, err := readMode(a)
		if script != want.script || string(head) != want.head || err != nil {
			t.Errorf("%q: %v, %q, %v", sent, script, head, err)
		}
		a.Close()
	}
	a, b := net.Pipe()
	go b.Write(bytes.Repeat([]byte("x"), 5000))
	if _, head, err := readMode(a); len(head) != maxMode || err != nil {
		t.Errorf("a long line: %d bytes, %v", len(head), err)
	}
	a.Close()
}
