package pod

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"kuasar.io/kuasar/guest/protocol"
)

// debugSocket is the name of the socket in a pod's state directory whose connections lead to the
// guest's debug console.
const debugSocket = "debug.sock"

// serveDebug bridges every connection to <dir>/debug.sock to the guest's debug console, for people
// on a node without vsock. The returned function ends it.
func serveDebug(dir string, guest *Guest) (func() error, error) {
	path := filepath.Join(dir, debugSocket)
	l, err := ListenUnix(path)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go bridge(ctx, conn, guest)
		}
	}()
	return func() error {
		cancel()
		return closeListener(l, path)
	}, nil
}

func bridge(ctx context.Context, client net.Conn, guest *Guest) {
	defer client.Close()
	dialCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	server, err := guest.Dial(dialCtx, protocol.PortConsole)
	if err != nil {
		fmt.Fprintf(client, "cannot reach the guest's debug console: %v\r\n", err)
		return
	}
	defer server.Close()
	stop := context.AfterFunc(ctx, func() {
		client.Close()
		server.Close()
	})
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = io.Copy(server, client)
		halfClose(server)
	})
	_, _ = io.Copy(client, server)
	// The guest's shell has ended: what the client would still type goes nowhere.
	client.Close()
	wg.Wait()
}

// halfClose tells the peer that nothing more comes, and keeps reading possible.
func halfClose(c net.Conn) {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		_ = w.CloseWrite()
	}
}

// ListenUnix listens on path with mode 0600; a socket file left there by another daemon is replaced.
// The caller knows that no other daemon lives. Closing the listener leaves the file.
func ListenUnix(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("cannot replace the socket %s: %w", path, err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("cannot protect the socket %s: %w", path, err)
	}
	return l, nil
}

func closeListener(l net.Listener, path string) error {
	_ = l.Close()
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}
