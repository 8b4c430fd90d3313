package isulad

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"testing"
)

// TestScheme looks at the headers themselves, as gRPC servers do not tell the scheme: Gen-B says
// https in cleartext.
func TestScheme(t *testing.T) {
	const plain, secure = 0x86, 0x87 // :scheme in HPACK's static table
	for version, want := range map[Version]byte{V213: plain, V216: secure} {
		socket := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		d, err := New(Config{Version: version, Sandboxer: "vmm", Socket: socket})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { _, err := d.call("Platform", "p", nil); done <- err }()
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		preface := make([]byte, len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
		if _, err := io.ReadFull(conn, preface); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0}); err != nil { // empty SETTINGS
			t.Fatal(err)
		}
		for {
			var header [9]byte
			if _, err := io.ReadFull(conn, header[:]); err != nil {
				t.Fatal(err)
			}
			body := make([]byte, binary.BigEndian.Uint32(append([]byte{0}, header[:3]...)))
			if _, err := io.ReadFull(conn, body); err != nil {
				t.Fatal(err)
			}
			if header[3] != 1 { // not HEADERS
				continue
			}
			// :method POST is first, then the scheme.
			if len(body) < 2 || body[0] != 0x83 || body[1] != want {
				t.Errorf("version %d: the headers start with %#x, want 0x83 %#x", version, body[:min(len(body), 2)], want)
			}
			break
		}
		d.Close()
		conn.Close()
		if err := <-done; err == nil {
			t.Error("a call is answered by nobody")
		}
	}
}
