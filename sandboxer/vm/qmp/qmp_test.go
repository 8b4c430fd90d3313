package qmp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"kuasar.io/kuasar/sandboxer/vm/qmp"
	"kuasar.io/kuasar/sandboxer/vm/vmtest"
)

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func listen(t *testing.T) *net.UnixListener {
	t.Helper()
	dir, err := os.MkdirTemp("", "qmp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/q", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func connect(t *testing.T, s *vmtest.Server, onEvent func(qmp.Event)) *qmp.Client {
	t.Helper()
	l := listen(t)
	go s.Serve(l)
	c, err := qmp.Dial(testContext(t), l.Addr().String(), onEvent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestExecute(t *testing.T) {
	s := &vmtest.Server{Commands: map[string]vmtest.Handler{
		"query-status": func(args json.RawMessage, _ *os.File) (any, error) {
			if args != nil {
				return nil, errors.New("arguments")
			}
			return map[string]any{"running": true}, nil
		},
		"device_add": func(json.RawMessage, *os.File) (any, error) {
			return nil, &vmtest.Refusal{Class: "DeviceNotFound", Desc: "no bus rp9"}
		},
	}}
	c := connect(t, s, nil)
	ctx := testContext(t)
	var status struct{ Running bool }
	if err := c.Execute(ctx, "query-status", nil, &status); err != nil || !status.Running {
		t.Fatalf("%v, %v", status, err)
	}
	var refused *qmp.Error
	err := c.Execute(ctx, "device_add", map[string]string{"driver": "x"}, nil)
	if !errors.As(err, &refused) || refused.Class != "DeviceNotFound" || refused.Command != "device_add" {
		t.Fatalf("got %v", err)
	}
	if err := c.Execute(ctx, "frobnicate", nil, nil); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
		t.Fatalf("got %v", err)
	}
	// Too long for the server: refused here, and the next one goes through.
	if err := c.Execute(ctx, "query-status", strings.Repeat("x", qmp.MaxRequest), nil); err == nil {
		t.Fatal("an over-long request was sent")
	}
	if err := c.Execute(ctx, "query-status", nil, nil); err != nil {
		t.Fatal(err)
	}
}

func TestExecuteConcurrently(t *testing.T) {
	s := &vmtest.Server{Commands: map[string]vmtest.Handler{
		"echo": func(args json.RawMessage, _ *os.File) (any, error) { return args, nil },
	}}
	c := connect(t, s, nil)
	ctx := testContext(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			var back map[string]int
			// The server refuses two requests that arrive in one read.
			if err := c.Execute(ctx, "echo", map[string]int{"n": i}, &back); err != nil || back["n"] != i {
				t.Errorf("%d came back as %v, %v", i, back, err)
			}
		})
	}
	wg.Wait()
}

func TestFilesTravelWithTheirCommand(t *testing.T) {
	s := &vmtest.Server{Commands: map[string]vmtest.Handler{
		"add-fd": func(_ json.RawMessage, file *os.File) (any, error) {
			if file == nil {
				return nil, errors.New("no file descriptor")
			}
			defer file.Close()
			b := make([]byte, 16)
			n, _ := file.ReadAt(b, 0)
			return map[string]string{"content": string(b[:n])}, nil
		},
	}}
	c := connect(t, s, nil)
	path := t.TempDir() + "/f"
	if err := os.WriteFile(path, []byte("disk"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var got struct{ Content string }
	if err := c.ExecuteWithFile(testContext(t), "add-fd", nil, &got, f); err != nil || got.Content != "disk" {
		t.Fatalf("%q, %v", got.Content, err)
	}
}

func TestEventsBetweenAnswers(t *testing.T) {
	s := &vmtest.Server{}
	s.Commands = map[string]vmtest.Handler{
		"device_del": func(json.RawMessage, *os.File) (any, error) {
			s.Emit("DEVICE_DELETED", map[string]string{"device": "disk"})
			return nil, nil
		},
	}
	events := make(chan qmp.Event, 4)
	c := connect(t, s, func(e qmp.Event) { events <- e })
	if err := c.Execute(testContext(t), "device_del", nil, nil); err != nil {
		t.Fatal(err)
	}
	if e := <-events; e.Name != "DEVICE_DELETED" || !bytes.Contains(e.Data, []byte("disk")) {
		t.Fatalf("got %v", e)
	}
}

// TestAbandonedCommandHoldsItsTurn: StratoVirt takes two requests in one read for garbage.
func TestAbandonedCommandHoldsItsTurn(t *testing.T) {
	release := make(chan struct{})
	s := &vmtest.Server{Commands: map[string]vmtest.Handler{
		"slow": func(json.RawMessage, *os.File) (any, error) { <-release; return nil, errors.New("late") },
		"fast": func(json.RawMessage, *os.File) (any, error) { return nil, nil },
	}}
	c := connect(t, s, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := c.Execute(ctx, "slow", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	if err := c.Execute(ctx, "fast", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a second request was sent: %v", err)
	}
	close(release)
	if err := c.Execute(testContext(t), "fast", nil, nil); err != nil {
		t.Fatal(err)
	}
}

func TestRefusalWithoutID(t *testing.T) {
	l := listen(t)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		conn.Write([]byte("{\"StratoVirt\":1,\"QMP\":{}}\r\n"))
		buf := make([]byte, 1000)
		conn.Read(buf)
		conn.Write([]byte("{\"return\":{},\"id\":\"1\"}\r\n"))
		conn.Read(buf)
		conn.Write([]byte("{\"return\":{},\"id\":\"77\"}\r\n{\"error\":{\"class\":\"GenericError\",\"desc\":\"\"}}\r\n"))
	}()
	c, err := qmp.Dial(testContext(t), l.Addr().String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var refused *qmp.Error
	if err := c.Execute(testContext(t), "quit", nil, nil); !errors.As(err, &refused) {
		t.Fatalf("got %v", err)
	}
}

func TestServerThatMisbehaves(t *testing.T) {
	for name, says := range map[string]string{
		"silent and gone":  "",
		"no greeting":      "{\"return\":{}}\n",
		"garbage":          "hello\n",
		"endless line":     strings.Repeat("x", qmp.MaxReply+10),
		"two greetings":    "{\"QMP\":{}}\n{\"QMP\":{}}\n",
		"two things":       "{\"QMP\":{}}\n{\"return\":{},\"event\":\"X\",\"id\":\"1\"}\n",
		"garbage after it": "{\"QMP\":{}}\n{{{\n",
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				conn.Write([]byte(says))
				conn.Close()
			}()
			if c, err := qmp.Dial(testContext(t), l.Addr().String(), nil); err == nil {
				c.Close()
				t.Fatal("connected")
			}
		})
	}
}

func TestSilentServer(t *testing.T) {
	l := listen(t)
	go (&vmtest.Server{Silent: true}).Serve(l)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := qmp.Dial(ctx, l.Addr().String(), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
}

func TestServerDiesUnderACommand(t *testing.T) {
	s := &vmtest.Server{DieAfter: 1, OnDie: func() {}}
	c := connect(t, s, nil)
	if err := c.Execute(testContext(t), "quit", nil, nil); err == nil || c.Err() == nil {
		t.Fatalf("got %v, %v", err, c.Err())
	}
	<-c.Done()
	if err := c.Execute(testContext(t), "quit", nil, nil); err == nil {
		t.Fatal("a command after the end")
	}
}
