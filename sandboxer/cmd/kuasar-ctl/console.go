package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/sandboxer/pod"
)

const (
	// consoleTimeout bounds how long the way to the guest's shell may take to open.
	consoleTimeout = 10 * time.Second
	// scriptMode, as the first line, gets a shell without a terminal: no prompt, no echo.
	scriptMode = "KSR_MODE exec\n"
	// defaultEscape leaves the console, as in virsh and telnet.
	defaultEscape = "^]"
)

func console(c *call, f *flag.FlagSet) func(context.Context, []string) error {
	escape := f.String("e", defaultEscape, "leave the console with this `character`: ^ and a letter or one of @[\\]^_, or none")
	return func(ctx context.Context, args []string) error {
		if c.json() {
			return usagef("console: a console has no JSON; use -o text")
		}
		char, err := parseEscape(*escape)
		if err != nil {
			return err
		}
		i, err := c.pod(args[0])
		if err != nil {
			return err
		}
		conn, err := dialConsole(ctx, i)
		if err != nil {
			return err
		}
		defer conn.Close()
		out, ok := c.out.(*os.File)
		if ok && isTerminal(c.in) && isTerminal(out) {
			hint := ""
			if char >= 0 {
				hint = "; " + *escape + " leaves"
			}
			fmt.Fprintf(c.err, "Connected to the debug console of pod %s%s.\n", short(i.ID), hint)
			return interact(ctx, conn, c.in, out, char)
		}
		return script(ctx, conn, c.in, c.out)
	}
}

// parseEscape returns the character, or -1 for none.
func parseEscape(s string) (int, error) {
	if s == "none" {
		return -1, nil
	}
	if len(s) == 2 && s[0] == '^' {
		if upper := strings.ToUpper(s[1:])[0]; upper >= '@' && upper <= '_' {
			return int(upper - '@'), nil
		}
	}
	return 0, usagef("console: -e %s: want ^ and a letter or one of @[\\]^_, or none", s)
}

// dialConsole opens a connection to the guest's debug console: over the socket that the daemon
// serves, or straight over vsock, which needs no daemon.
func dialConsole(ctx context.Context, i *pod.Inspection) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, consoleTimeout)
	defer cancel()
	fail := func(err error) (net.Conn, error) {
		return nil, fmt.Errorf("cannot open the debug console of pod %s: %w", short(i.ID), err)
	}
	if i.Err != nil {
		return fail(i.Err)
	}
	if i.Hypervisor == nil || i.Hypervisor.Life() == pod.Dead {
		return fail(fmt.Errorf("its virtual machine does not run (state %s); kuasar-ctl logs %s shows its last words", stateOf(i), short(i.ID)))
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", i.DebugSocket())
	switch {
	case err == nil:
		return conn, nil
	case errors.Is(err, fs.ErrNotExist):
		err = errors.New("it was made without one: set debug = true in [hypervisor] of the daemon's configuration, " +
			"restart the daemon (systemctl restart kuasar-vmm), and make the pod anew")
	case errors.Is(err, unix.ECONNREFUSED):
		err = errors.New("the daemon, which leads to it, does not run: systemctl start kuasar-vmm")
	default:
		err = asRoot(err)
	}
	if i.VsockCID == 0 {
		return fail(err)
	}
	direct, verr := vsock.DialContext(ctx, i.VsockCID, protocol.PortConsole, nil)
	if verr != nil {
		return fail(fmt.Errorf("%w; nor does the guest answer on vsock %d:%d: %w", err, i.VsockCID, protocol.PortConsole, verr))
	}
	return direct, nil
}

// script lets the guest's shell run what comes on standard input.
func script(ctx context.Context, conn net.Conn, in io.Reader, out io.Writer) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if _, err := io.WriteString(conn, scriptMode); err != nil {
		return fmt.Errorf("cannot talk to the debug console: %w", err)
	}
	go func() {
		_, _ = io.Copy(conn, in)
		// The shell ends when it has run what came.
		if w, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = w.CloseWrite()
		}
	}()
	_, err := io.Copy(out, conn)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("the debug console was cut off: %w", err)
	}
	return nil
}

// interact joins the terminal to the guest's shell until either side ends it. The terminal is given
// back as it was, whatever happens short of SIGKILL.
func interact(ctx context.Context, conn net.Conn, in, out *os.File, escape int) error {
	restore, err := makeRaw(in)
	if err != nil {
		return err
	}
	defer restore()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	left := make(chan struct{})
	go func() {
		if typed(conn, in, escape) {
			close(left)
			conn.Close()
			return
		}
		if w, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = w.CloseWrite()
		}
	}()
	_, err = io.Copy(out, conn)
	restore()
	select {
	case <-left:
		err = nil
	default:
	}
	fmt.Fprintln(out)
	if ctx.Err() != nil {
		return fmt.Errorf("the console was left: %w", ctx.Err())
	}
	if err != nil {
		return fmt.Errorf("the debug console was cut off: %w", err)
	}
	return nil
}

// typed copies what is typed to the guest and returns true at the escape character, false at the
// end of either.
func typed(guest io.Writer, in io.Reader, escape int) bool {
	buf := make([]byte, 1024)
	for {
		n, err := in.Read(buf)
		p := buf[:n]
		leave := false
		for i, b := range p {
			if int(b) == escape {
				p, leave = p[:i], true
				break
			}
		}
		if len(p) > 0 {
			if _, werr := guest.Write(p); werr != nil {
				return false
			}
		}
		if leave {
			return true
		}
		if err != nil {
			return false
		}
	}
}

func isTerminal(f *os.File) bool {
	if f == nil {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// makeRaw gives every key to the program, uninterpreted. The returned function undoes it and may be
// called more than once.
func makeRaw(f *os.File) (restore func(), err error) {
	fd := int(f.Fd())
	saved, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("cannot read the terminal's settings: %w", err)
	}
	raw := *saved
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nil, fmt.Errorf("cannot change the terminal's settings: %w", err)
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, saved) }, nil
}
