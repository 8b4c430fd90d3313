package storage

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// init turns this process into a stand-in for StratoVirt's daemon, if it was started as one.
func init() {
	if filepath.Base(os.Args[0]) == "vhost_user_fs" {
		os.Exit(vhostUserFS(os.Args[1:]))
	}
}

// vhostUserFS takes what the real one takes, and ends with status 0 even when it fails.
func vhostUserFS(args []string) int {
	if slices.Contains(args, "--version") {
		fmt.Fprintln(os.Stderr, "found argument '--version' which wasn't expected")
		return 1
	}
	if slices.Contains(args, "-help") {
		fmt.Println("OPTIONS:\n  -source DIR\n  -socket-path PATH")
		return 0
	}
	options := map[string]string{}
	for i := 0; i < len(args); i++ {
		switch args[i] {
		case "-source", "-socket-path", "-sandbox", "-rlimit-nofile":
			options[args[i]] = args[i+1]
			i++
		case "-D":
		default:
			fmt.Fprintln(os.Stderr, "unexpected", args[i])
			return 1
		}
	}
	if fi, err := os.Stat(options["-source"]); err != nil || !fi.IsDir() {
		fmt.Fprintln(os.Stderr, "no source")
		return 0
	}
	l, err := net.Listen("unix", options["-socket-path"])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 0
	}
	conn, err := l.Accept() // the one that it serves
	if err == nil {
		conn.Read(make([]byte, 1))
	}
	l.Close()
	return 0
}

func fakeVhostUserFS(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "vhost_user_fs")
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestStratoVirtsDaemon(t *testing.T) {
	path := fakeVhostUserFS(t)
	if _, kind, err := find([]string{path}); err != nil || kind != KindStratoVirt {
		t.Fatalf("%q, %v", kind, err)
	}
	sock := socketPath(t)
	// What a killed one has left, it does not replace itself.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	d, err := StartVirtiofsd(t.Context(), Virtiofsd{Path: path, Share: t.TempDir(), Socket: sock})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Stop() })
	// It listens at once, and nobody has used up its only connection.
	conn, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	<-d.Exited()

	_, err = StartVirtiofsd(t.Context(), Virtiofsd{Path: path, Share: "/nonexistent", Socket: sock})
	if err == nil || !strings.Contains(err.Error(), "no source") {
		t.Errorf("a failure that its status does not tell: %v", err)
	}
	if _, err := os.Stat(sock); err == nil {
		t.Error("the socket is left")
	}
	if err := syscall.Kill(d.pid, 0); err == nil {
		t.Error("it is still there")
	}
}
