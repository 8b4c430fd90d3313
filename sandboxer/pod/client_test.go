package pod

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
)

func mustStartFor(t *testing.T, m *Manager, id string, c Client) Status {
	t.Helper()
	if err := m.Create(t.Context(), CreateRequest{ID: id, Client: c, NetNS: ownNetNS, Config: testConfig()}); err != nil {
		t.Fatal(err)
	}
	s, err := m.Start(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTaskAddress(t *testing.T) {
	const socket = "unix://DIR/a/task.sock"
	for _, tc := range []struct {
		name     string
		client   Client
		form     string
		cid      uint32
		feature  string
		want     string
		version  uint32
		isDirect bool
	}{
		{"containerd", Containerd, "", 7, "direct", "ttrpc+" + socket, 3, false},
		{"containerd, whatever iSulad gets", Containerd, AddressVsock, 7, "direct", "ttrpc+" + socket, 3, false},
		{"2.1.3", ISulad213, "", 7, "direct", "vsock://7:1024", 2, true},
		{"2.1.6", ISulad216, "", 7, "direct", "ttrpc+vsock://7:1024", 2, true},
		{"auto", ISulad216, AddressAuto, 7, "direct", "ttrpc+vsock://7:1024", 2, true},
		{"2.1.5 with a newer shim library", ISulad213, AddressTTRPCVsock, 7, "direct", "ttrpc+vsock://7:1024", 2, true},
		{"2.1.6 with an older shim library", ISulad216, AddressVsock, 7, "direct", "vsock://7:1024", 2, true},
		{"2.1.3, as configured", ISulad213, AddressUnix, 7, "direct", socket, 2, false},
		{"2.1.6 without vsock", ISulad216, "", 0, "direct", socket, 2, false},
		{"2.1.3 without vsock, whatever is configured", ISulad213, AddressVsock, 0, "direct", socket, 2, false},
		{"an agent that makes no direct containers", ISulad213, "", 7, "other", socket, 2, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.cid = tc.cid
			w.hello = &protocol.Hello{ProtocolVersion: protocol.Version, Features: []string{tc.feature}}
			o := testOptions(t, w)
			o.ISuladAddress = tc.form
			m := NewManager(o)
			want := strings.Replace(tc.want, "DIR", o.Dir, 1)
			s := mustStartFor(t, m, "a", tc.client)
			c := w.get("containers", "a").(*fakeContainers).c
			if s.Address != want || s.Version != tc.version || s.Client != tc.client {
				t.Errorf("the address is %s, version %d, client %q; want %s, %d", s.Address, s.Version, s.Client, want, tc.version)
			}
			if c.Address != want || c.Client != tc.client || c.Direct != tc.isDirect {
				t.Errorf("the containers were told of %s, %q, direct: %v", c.Address, c.Client, c.Direct)
			}

			// A machine keeps its address, whatever the next daemon's configuration says.
			m.Close()
			w.dropDaemon()
			o.ISuladAddress = AddressUnix
			if tc.form == AddressUnix {
				o.ISuladAddress = AddressAuto
			}
			after, err := another(t, o).Status("a")
			if err != nil || after.Address != want || after.Client != tc.client || after.Version != tc.version {
				t.Errorf("another daemon: %+v, %v", after, err)
			}
			if c := w.get("containers", "a").(*fakeContainers).c; c.Address != want || c.Client != tc.client || c.Direct != tc.isDirect {
				t.Errorf("another daemon told the containers of %s, %q, direct: %v", c.Address, c.Client, c.Direct)
			}
		})
	}
}

func TestClaimVsock(t *testing.T) {
	tried := map[uint32]bool{}
	cid, err := claim(func(cid uint32) error {
		tried[cid] = true
		if cid < 3 || cid >= 1<<31 {
			t.Errorf("%d is no guest's", cid)
		}
		if len(tried) < 3 {
			return unix.EADDRINUSE
		}
		return nil
	})
	if err != nil || !tried[cid] || len(tried) != 3 {
		t.Errorf("got %d, %v, after %v", cid, err, tried)
	}
	calls := 0
	if _, err := claim(func(uint32) error { calls++; return unix.EADDRINUSE }); err == nil || calls != claims {
		t.Errorf("all taken: %v after %d attempts", err, calls)
	}
	if _, err := claim(func(uint32) error { return unix.EPERM }); !errors.Is(err, unix.EPERM) {
		t.Errorf("got %v", err)
	}
}

// Daemons that know of no announcements must not take over pods whose containers were announced.
func TestJournalNamesTheClient(t *testing.T) {
	for client, schema := range map[Client]int{Containerd: 1, ISulad213: 2, ISulad216: 2} {
		w := newWorld(t)
		o := testOptions(t, w)
		mustStartFor(t, NewManager(o), "a", client)
		content, err := os.ReadFile(filepath.Join(o.Dir, "a", journalName))
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Schema      int
			Readable_By int
			Client      Client
		}
		if err := json.Unmarshal(content, &got); err != nil || got.Schema != schema || got.Readable_By != schema || got.Client != client {
			t.Errorf("%s: %+v, %v", client, got, err)
		}
		i, err := Inspect(o.Dir, "a")
		if err != nil || i.Err != nil || i.Client != client || i.Schema != schema {
			t.Errorf("%s: %+v, %v", client, i, err)
		}
	}
}
