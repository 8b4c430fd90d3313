package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// guest serves the debug socket of a pod in base and returns the connection of the first client.
func guest(t *testing.T, base string) <-chan *net.UnixConn {
	t.Helper()
	dir := state(t, base, "pod1", nil)
	l, err := net.Listen("unix", filepath.Join(dir, "debug.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	conns := make(chan *net.UnixConn, 1)
	go func() {
		if conn, err := l.Accept(); err == nil {
			conns <- conn.(*net.UnixConn)
		}
	}()
	return conns
}

func TestConsoleScript(t *testing.T) {
	base := t.TempDir()
	conns := guest(t, base)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(w, "echo hello")
	w.Close()
	var got string
	served := make(chan struct{})
	go func() {
		defer close(served)
		conn := <-conns
		// All of it, up to the end that the client tells; it still reads the answer then.
		b, _ := io.ReadAll(conn)
		got = string(b)
		fmt.Fprint(conn, "the answer\n")
		conn.Close()
	}()
	var out, errs bytes.Buffer
	if status := run(t.Context(), []string{"--dir", base, "console", "p"}, streams{r, &out, &errs}); status != 0 || out.String() != "the answer\n" || errs.Len() > 0 {
		t.Errorf("status %d, %q, %q", status, out.String(), errs.String())
	}
	<-served
	if got != "KSR_MODE exec\necho hello\n" {
		t.Errorf("the guest got %q", got)
	}
}

func TestConsoleErrors(t *testing.T) {
	base := t.TempDir()
	dir := state(t, base, "none", nil)
	if _, errs, status := ctl(t, "--dir", base, "console", "none"); status != exitFailed || !strings.Contains(errs, "debug = true") {
		t.Errorf("without a console: status %d, %s", status, errs)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "debug.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, errs, status := ctl(t, "--dir", base, "console", "none"); status != exitFailed || !strings.Contains(errs, "systemctl start kuasar-vmm") {
		t.Errorf("without a daemon: status %d, %s", status, errs)
	}
	state(t, base, "dead", map[string]any{"machine": map[string]any{"PID": os.Getpid(), "Saved": map[string]any{"start_time": 1}}})
	if _, errs, status := ctl(t, "--dir", base, "console", "dead"); status != exitFailed || !strings.Contains(errs, "does not run") {
		t.Errorf("of a dead machine: status %d, %s", status, errs)
	}
}

func TestParseEscape(t *testing.T) {
	for s, want := range map[string]int{"^]": 0x1d, "^a": 1, "^A": 1, "^@": 0, "^_": 0x1f, "none": -1} {
		if got, err := parseEscape(s); err != nil || got != want {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "x", "^", "^1", "^]x", "^`"} {
		if _, err := parseEscape(s); err == nil {
			t.Errorf("%q passes", s)
		}
	}
}

// terminal makes a terminal and returns its two ends.
func terminal(t *testing.T) (keyboard, tty *os.File) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("this machine makes no terminals:", err)
	}
	t.Cleanup(func() { keyboard.Close() })
	if err := unix.IoctlSetPointerInt(int(keyboard.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(keyboard.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	return keyboard, tty
}

func settings(t *testing.T, tty *os.File) unix.Termios {
	t.Helper()
	s, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *s
}

func TestConsoleOnATerminal(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(keyboard *os.File, conn net.Conn, cancel func())
		err  bool
	}{
		{"the escape character", func(k *os.File, _ net.Conn, _ func()) { fmt.Fprint(k, "\x1dnot sent") }, false},
		{"the shell's end", func(_ *os.File, c net.Conn, _ func()) { c.Close() }, false},
		{"a signal", func(_ *os.File, _ net.Conn, cancel func()) { cancel() }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			keyboard, tty := terminal(t)
			before := settings(t, tty)
			base := t.TempDir()
			conns := guest(t, base)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var errs bytes.Buffer
			ended := make(chan int, 1)
			go func() { ended <- run(ctx, []string{"--dir", base, "console", "pod1"}, streams{tty, tty, &errs}) }()
			conn := <-conns
			fmt.Fprint(conn, "prompt# \n")
			screen := bufio.NewReader(keyboard)
			// Raw: the line feed comes without a carriage return.
			if line, err := screen.ReadString('\n'); err != nil || line != "prompt# \n" {
				t.Errorf("the screen shows %q, %v", line, err)
			}
			during := settings(t, tty)
			if during.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG) != 0 {
				t.Errorf("the terminal is not raw: %x", during.Lflag)
			}
			// Interrupts are the guest's.
			fmt.Fprint(keyboard, "ls\r\x03")
			got := make([]byte, 4)
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != "ls\r\x03" {
				t.Errorf("the guest got %q, %v", got, err)
			}
			test.end(keyboard, conn, cancel)
			if status := <-ended; (status != 0) != test.err {
				t.Errorf("status %d, %s", status, errs.String())
			}
			if settings(t, tty) != before {
				t.Error("the terminal is not as it was")
			}
			if rest, _ := io.ReadAll(conn); len(rest) > 0 {
				t.Errorf("the guest got %q behind the escape character", rest)
			}
			conn.Close()
			if !strings.Contains(errs.String(), "^] leaves") {
				t.Errorf("the greeting is %q", errs.String())
			}
		})
	}
}

func TestTypedWithoutEscape(t *testing.T) {
	var guest bytes.Buffer
	if typed(&guest, strings.NewReader("a\x1db"), -1) || guest.String() != "a\x1db" {
		t.Errorf("the guest got %q", guest.String())
	}
	if typed(failing{}, strings.NewReader("a"), 0x1d) {
		t.Error("a guest that is gone passes for the escape character")
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("gone") }
