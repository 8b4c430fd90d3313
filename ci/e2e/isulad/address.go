package isulad

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Shim is a version of lib-shim-v2, the library through which iSulad reaches a task service. It
// decides which forms of address are understood.
type Shim int

const (
	// ShimVsock understands vsock:// and unix:///. It came with April 2023.
	ShimVsock Shim = iota
	// ShimTTRPCVsock understands ttrpc+vsock:// and unix:///, and vsock:// no longer (October 2024).
	ShimTTRPCVsock
	// ShimTTRPC understands ttrpc+unix:/// too (December 2024).
	ShimTTRPC
)

// An endpoint is where an address leads: to a Unix socket, or, where unix is empty, over vsock.
type endpoint struct {
	unix      string // an abstract socket starts with @
	cid, port uint32
}

// parse reads a task address as the library does. What it knows no form for it takes for the name
// of an abstract Unix socket, with a slash in front.
func (s Shim) parse(address string) (endpoint, error) {
	vsock := "vsock://"
	if s >= ShimTTRPCVsock {
		vsock = "ttrpc+vsock://"
	}
	if rest, ok := strings.CutPrefix(address, vsock); ok {
		parts := strings.Split(rest, ":")
		if len(parts) != 2 {
			return endpoint{}, fmt.Errorf("task address %q: want %sCID:PORT", address, vsock)
		}
		cid, err := strconv.ParseUint(parts[0], 10, 32)
		if err != nil {
			return endpoint{}, fmt.Errorf("task address %q: the CID is not a decimal number of 32 bits: %w", address, err)
		}
		port, err := strconv.ParseUint(parts[1], 10, 32)
		if err != nil {
			return endpoint{}, fmt.Errorf("task address %q: the port is not a decimal number of 32 bits: %w", address, err)
		}
		return endpoint{cid: uint32(cid), port: uint32(port)}, nil
	}
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		return endpoint{unix: path}, nil
	}
	if path, ok := strings.CutPrefix(address, "ttrpc+unix://"); ok && s >= ShimTTRPC {
		return endpoint{unix: path}, nil
	}
	return endpoint{unix: "@/" + address}, nil
}

// stdioCID tells whether iSulad of this version gives an exec vsock ports for its streams, and on
// which CID. The test is on the text alone: ttrpc+vsock:// does not pass it.
func (v Version) stdioCID(address string) (uint32, bool) {
	if v != V214 && v != V215 {
		return 0, false
	}
	rest, ok := strings.CutPrefix(address, "vsock://")
	if !ok {
		return 0, false
	}
	text, port, ok := strings.Cut(rest, ":")
	if !ok {
		return 0, false
	}
	cid, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return 0, false
	}
	if _, err := strconv.ParseUint(port, 10, 32); err != nil {
		return 0, false
	}
	return uint32(cid), true
}

// dialVsock makes one attempt to connect to the port of a virtual machine. The caller closes the
// connection.
func dialVsock(cid, port uint32) (net.Conn, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot make a vsock socket: %w (is the kernel module vsock loaded?)", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: cid, Port: port}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot connect to vsock %d:%d: %w", cid, port, err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot make the connection to vsock %d:%d pollable: %w", cid, port, err)
	}
	return &vsockConn{os.NewFile(uintptr(fd), fmt.Sprintf("vsock:%d:%d", cid, port))}, nil
}

// vsockConn makes a net.Conn of a vsock socket; net has none of its own.
type vsockConn struct{ *os.File }

type vsockAddr string

func (vsockAddr) Network() string  { return "vsock" }
func (a vsockAddr) String() string { return string(a) }

func (c *vsockConn) LocalAddr() net.Addr  { return vsockAddr("vsock:local") }
func (c *vsockConn) RemoteAddr() net.Addr { return vsockAddr(c.Name()) }

func (c *vsockConn) SetDeadline(t time.Time) error { return c.File.SetDeadline(t) }
