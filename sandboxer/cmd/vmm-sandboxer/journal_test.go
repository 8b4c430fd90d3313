package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// journalPeer is the journal's end: it takes records apart again.
type journalPeer struct {
	t    *testing.T
	conn *net.UnixConn
}

func newJournalPeer(t *testing.T) (journalPeer, string) {
	path := filepath.Join(shortDir(t), "j")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return journalPeer{t, conn}, path
}

func (p journalPeer) next() map[string]string {
	p.t.Helper()
	buf, oob := make([]byte, 1<<20), make([]byte, 64)
	n, oobn, _, _, err := p.conn.ReadMsgUnix(buf, oob)
	if err != nil {
		p.t.Fatal(err)
	}
	record := buf[:n]
	if oobn > 0 {
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			p.t.Fatal(err)
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			p.t.Fatal(err)
		}
		f := os.NewFile(uintptr(fds[0]), "record")
		defer f.Close()
		seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
		if want := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE; err != nil || seals != want {
			p.t.Fatalf("seals %#x (%v), want %#x: the journal would refuse the file", seals, err, want)
		}
		if record, err = io.ReadAll(io.NewSectionReader(f, 0, 64<<20)); err != nil {
			p.t.Fatal(err)
		}
	}
	fields := map[string]string{}
	for len(record) > 0 {
		line, rest, found := bytes.Cut(record, []byte("\n"))
		if !found {
			p.t.Fatalf("the record ends within a line: %q", line)
		}
		name, value, short := strings.Cut(string(line), "=")
		if !short {
			size := binary.LittleEndian.Uint64(rest)
			rest = rest[8:]
			if value = string(rest[:size]); rest[size] != '\n' {
				p.t.Fatalf("after %s comes %q", name, rest[size])
			}
			rest = rest[size+1:]
		}
		if _, double := fields[name]; double {
			p.t.Errorf("two fields %s", name)
		}
		fields[name] = value
		record = rest
	}
	return fields
}

func newJournalLog(t *testing.T, level slog.Leveler) (journalPeer, *slog.Logger, *bytes.Buffer) {
	peer, path := newJournalPeer(t)
	socket, err := dialJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.conn.Close() })
	fallback := new(bytes.Buffer)
	return peer, slog.New(&journalHandler{level: level, journal: socket, fallback: slog.NewTextHandler(fallback, nil)}), fallback
}

func TestJournalFields(t *testing.T) {
	peer, log, fallback := newJournalLog(t, slog.LevelInfo)
	log.Debug("not heard")
	log.With("pod", "p1").With("pod", "p1").WithGroup("g-x").With("a", 1).Warn("a thing happened",
		"error", errors.New("cannot: \"so\"\nnor so"), slog.Group("in", "b", true), "console", "line\nline\n", "empty", "")
	got := peer.next()
	for name, want := range map[string]string{
		"MESSAGE":              `a thing happened pod=p1 g-x.a=1 g-x.error="cannot: \"so\"\nnor so" g-x.in.b=true g-x.empty=""`,
		"PRIORITY":             "4",
		"SYSLOG_IDENTIFIER":    "vmm-sandboxer",
		"KUASAR_POD":           "p1",
		"KUASAR_G_X_A":         "1",
		"KUASAR_G_X_ERROR":     "cannot: \"so\"\nnor so",
		"KUASAR_G_X_IN_B":      "true",
		"KUASAR_G_X_CONSOLE":   "line\nline\n",
		"KUASAR_G_X_EMPTY":     "",
		"CODE_FUNC":            "kuasar.io/kuasar/sandboxer/cmd/vmm-sandboxer.TestJournalFields",
		"KUASAR_NOT_SUCH_NAME": "",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
	if fallback.Len() > 0 {
		t.Errorf("the fallback got %q", fallback)
	}
}

func TestJournalPriorities(t *testing.T) {
	peer, log, _ := newJournalLog(t, levelTrace)
	for level, want := range map[slog.Level]string{levelTrace: "7", slog.LevelDebug: "7", slog.LevelInfo: "6", slog.LevelWarn: "4", slog.LevelError: "3", slog.LevelError + 4: "3"} {
		log.Log(t.Context(), level, "x")
		if got := peer.next()["PRIORITY"]; got != want {
			t.Errorf("%v has priority %s, want %s", level, got, want)
		}
	}
}

func TestJournalLongRecord(t *testing.T) {
	peer, log, fallback := newJournalLog(t, slog.LevelInfo)
	long := strings.Repeat("0123456789", 100_000)
	log.Info("long", "stack", long)
	got := peer.next()
	if got["KUASAR_STACK"] != long {
		t.Errorf("of %d bytes %d arrived", len(long), len(got["KUASAR_STACK"]))
	}
	if got["MESSAGE"] != "long" || fallback.Len() > 0 {
		t.Errorf("MESSAGE %q, fallback %q", got["MESSAGE"], fallback)
	}
}

func TestJournalComesAndGoes(t *testing.T) {
	peer, log, fallback := newJournalLog(t, slog.LevelInfo)
	address := peer.conn.LocalAddr().(*net.UnixAddr)
	peer.conn.Close()
	log.With("pod", "p1").Info("nobody hears")
	if !strings.Contains(fallback.String(), `msg="nobody hears" pod=p1`) {
		t.Errorf("the fallback got %q", fallback)
	}
	os.Remove(address.Name)
	again, err := net.ListenUnixgram("unixgram", address)
	if err != nil {
		t.Fatal(err)
	}
	peer.conn = again
	defer again.Close()
	log.Info("heard again")
	if got := peer.next()["MESSAGE"]; got != "heard again" {
		t.Errorf("MESSAGE %q", got)
	}
}

func TestFieldNames(t *testing.T) {
	for key, want := range map[string]string{
		"pod": "KUASAR_POD", "task call.ExecID": "KUASAR_TASK_CALL_EXECID", "größe": "KUASAR_GR__E", "2nd": "KUASAR_2ND",
		strings.Repeat("k", 100): "KUASAR_" + strings.Repeat("K", 57),
	} {
		if got := fieldName(key); got != want {
			t.Errorf("%q is called %s, want %s", key, got, want)
		}
	}
}

func TestStreamIsJournal(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	var stat unix.Stat_t
	if err := unix.Fstat(int(w.Fd()), &stat); err != nil {
		t.Fatal(err)
	}
	name := func(dev, ino uint64) string { return strings.Join([]string{uitoa(dev), uitoa(ino)}, ":") }
	for stream, want := range map[string]bool{
		name(uint64(stat.Dev), stat.Ino): true, name(uint64(stat.Dev), stat.Ino+1): false, name(uint64(stat.Dev)+1, stat.Ino): false, "": false, "x": false,
	} {
		if got := isJournal(w, stream); got != want {
			t.Errorf("JOURNAL_STREAM=%s: %v", stream, got)
		}
	}
}

func uitoa(n uint64) string { return slog.Uint64Value(n).String() }
