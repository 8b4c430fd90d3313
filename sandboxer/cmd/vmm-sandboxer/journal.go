package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// newLogger logs to the journal where stderr leads there, else as lines of text to stderr.
func newLogger(stderr io.Writer, level slog.Leveler) *slog.Logger {
	text := slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level, ReplaceAttr: traceName})
	f, ok := stderr.(*os.File)
	if !ok || !isJournal(f, os.Getenv("JOURNAL_STREAM")) {
		return slog.New(text)
	}
	journal, err := dialJournal(journalAddress)
	if err != nil {
		log := slog.New(text)
		log.Warn("the journal gets no fields", "error", err)
		return log
	}
	return slog.New(&journalHandler{level: level, journal: journal, fallback: text})
}

// isJournal tells whether f is the stream that the service manager says leads to the journal. The
// variable is inherited by children whose streams lead elsewhere.
func isJournal(f *os.File, stream string) bool {
	var stat unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &stat); err != nil {
		return false
	}
	return stream != "" && stream == fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
}

const journalAddress = "/run/systemd/journal/socket"

// journalLimit bounds how long a journal that does not read holds up who logs. The record then goes
// to the fallback.
const journalLimit = 2 * time.Second

// journalSocket sends records to the journal in its native protocol. A journal that was started
// anew is found by its address.
type journalSocket struct {
	conn    *net.UnixConn
	address *net.UnixAddr
}

func dialJournal(address string) (*journalSocket, error) {
	// Bound to a name that the kernel chooses: a connected socket could not follow the journal.
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("cannot make a socket for the journal: %w", err)
	}
	return &journalSocket{conn: conn, address: &net.UnixAddr{Net: "unixgram", Name: address}}, nil
}

func (j *journalSocket) send(record []byte) error {
	if err := j.conn.SetWriteDeadline(time.Now().Add(journalLimit)); err != nil {
		return err
	}
	_, _, err := j.conn.WriteMsgUnix(record, nil, j.address)
	if !errors.Is(err, unix.EMSGSIZE) && !errors.Is(err, unix.ENOBUFS) {
		return err
	}
	// Too long for a datagram. The journal reads a memory file that nobody can change any more.
	fd, err := unix.MemfdCreate("journal", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "journal")
	defer f.Close()
	if _, err := f.Write(record); err != nil {
		return err
	}
	seals := unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return err
	}
	_, _, err = j.conn.WriteMsgUnix(nil, unix.UnixRights(fd), j.address)
	return err
}

// journalHandler writes every attribute of a record as a field of its own, so that
// journalctl KUASAR_POD=<id> finds what was said about a pod. The field's name is the attribute's
// key in capitals after KUASAR_, with _ for whatever is no letter or digit and between the names of
// groups. MESSAGE is the message and, for those who read, the attributes; long ones and those of
// several lines are left out of it unless they are errors.
type journalHandler struct {
	level    slog.Leveler
	journal  *journalSocket
	fallback slog.Handler // for records that the journal does not take
	group    string       // of the attributes to come, with a dot at its end, or empty
	attrs    []attribute
}

type attribute struct {
	key, value string
	quiet      bool // not in MESSAGE
}

// The bounds of MESSAGE's attributes and of the names of fields, in bytes. The latter is the
// journal's own.
const (
	maxInline = 512
	maxName   = 64
)

func (h *journalHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.level.Level()
}

func (h *journalHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	c := *h
	c.group += name + "."
	c.fallback = h.fallback.WithGroup(name)
	return &c
}

func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.attrs = slices.Clone(h.attrs)
	for _, a := range attrs {
		c.attrs = appendAttribute(c.attrs, h.group, a)
	}
	c.fallback = h.fallback.WithAttrs(attrs)
	return &c
}

func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	attrs := slices.Clone(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		attrs = appendAttribute(attrs, h.group, a)
		return true
	})
	message := new(strings.Builder)
	message.WriteString(r.Message)
	record := new(bytes.Buffer)
	for _, a := range attrs {
		writeField(record, fieldName(a.key), a.value)
		if !a.quiet {
			value := a.value
			if value == "" || strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r == '"' || r == '=' || r == 0x7f }) {
				value = strconv.Quote(value)
			}
			message.WriteString(" " + a.key + "=" + value)
		}
	}
	writeField(record, "MESSAGE", message.String())
	writeField(record, "PRIORITY", priority(r.Level))
	writeField(record, "SYSLOG_IDENTIFIER", "vmm-sandboxer")
	if r.PC != 0 {
		frame, _ := runtime.CallersFrames([]uintptr{r.PC}).Next()
		writeField(record, "CODE_FILE", frame.File)
		writeField(record, "CODE_LINE", strconv.Itoa(frame.Line))
		writeField(record, "CODE_FUNC", frame.Function)
	}
	if err := h.journal.send(record.Bytes()); err != nil {
		return h.fallback.Handle(ctx, r)
	}
	return nil
}

// appendAttribute adds a, or the members of a if it is a group. Of two with the same key the later
// one counts.
func appendAttribute(attrs []attribute, group string, a slog.Attr) []attribute {
	value := a.Value.Resolve()
	if value.Kind() == slog.KindGroup {
		if a.Key != "" {
			group += a.Key + "."
		}
		for _, member := range value.Group() {
			attrs = appendAttribute(attrs, group, member)
		}
		return attrs
	}
	if a.Key == "" {
		return attrs
	}
	entry := attribute{key: group + a.Key, value: value.String()}
	if _, isError := value.Any().(error); !isError {
		entry.quiet = len(entry.value) > maxInline || strings.Contains(entry.value, "\n")
	}
	if i := slices.IndexFunc(attrs, func(other attribute) bool { return other.key == entry.key }); i >= 0 {
		attrs[i] = entry
		return attrs
	}
	return append(attrs, entry)
}

// fieldName is the name under which the journal has an attribute.
func fieldName(key string) string {
	name := "KUASAR_" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, key)
	return name[:min(len(name), maxName)]
}

// writeField appends a field. Only a value of one line has the short form.
func writeField(b *bytes.Buffer, name, value string) {
	b.WriteString(name)
	if !strings.Contains(value, "\n") {
		b.WriteString("=" + value + "\n")
		return
	}
	b.WriteByte('\n')
	b.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(value))))
	b.WriteString(value + "\n")
}

// priority is syslog's.
func priority(level slog.Level) string {
	switch {
	case level >= slog.LevelError:
		return "3"
	case level >= slog.LevelWarn:
		return "4"
	case level >= slog.LevelInfo:
		return "6"
	}
	return "7"
}
