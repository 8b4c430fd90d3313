package container

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	guestio "kuasar.io/kuasar/guest/protocol/stdio"
)

// LogFile says where the output of a container is logged whose client does not take it itself.
type LogFile struct {
	Path string `json:"path"`
	// MaxSize is at how many bytes the file is rotated; 0 is never.
	MaxSize int64 `json:"maxSize,omitempty"`
	// MaxFiles is how many files there are at most: Path, Path.1, ... Less than 2 is Path alone.
	MaxFiles int `json:"maxFiles,omitempty"`
}

// The annotations by which iSulad names a container's log.
const (
	logDriver = "log.console.driver"
	logPath   = "log.console.file"
	logSize   = "log.console.filesize"
	logRotate = "log.console.filerotate"
)

const (
	jsonFileDriver = "json-file"
	// noLog is the driver's name and, where iSulad's disable-log is set, the file's.
	noLog       = "none"
	maxLogFiles = 1000
	// iSulad's defaults, which it also takes for what it cannot read.
	defaultLogSize  = 1 << 20
	defaultLogFiles = 7
)

// logOf returns what the annotations of a spec say about its log, or nil for no log. iSulad does not check
// its configured max-size and max-file, so that these are no reason to refuse all its containers.
func logOf(spec *specs.Spec, log *slog.Logger) (*LogFile, error) {
	path := spec.Annotations[logPath]
	driver := spec.Annotations[logDriver]
	if path == "" || path == noLog || driver == noLog {
		return nil, nil
	}
	if driver != "" && driver != jsonFileDriver {
		log.Warn("the container's output is not logged: the log driver is not supported, only "+jsonFileDriver+" is", "driver", printable(driver))
		return nil, nil
	}
	if len(path) > unix.PathMax || strings.ContainsRune(path, 0) || !filepath.IsAbs(path) || filepath.Clean(path) != path {
		return nil, invalid("annotation %s: %.256q is not an absolute path without detours", logPath, path)
	}
	l := &LogFile{Path: path}
	if text := spec.Annotations[logSize]; text != "" {
		var err error
		if l.MaxSize, err = parseSize(text); err != nil {
			l.MaxSize = defaultLogSize
			log.Warn("the container's log is rotated at 1 MiB: its configured size cannot be read", "annotation", logSize, "error", err)
		}
	}
	if text := spec.Annotations[logRotate]; text != "" {
		n, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil || n < 0 || n > maxLogFiles {
			n = defaultLogFiles
			log.Warn("the container's log has 7 files: their configured number cannot be read",
				"annotation", logRotate, "value", printable(text), "want", fmt.Sprintf("0 to %d", maxLogFiles))
		}
		l.MaxFiles = n
	}
	return l, nil
}

// parseSize reads a size in bytes, with or without a fraction and a unit, each 1024 times the one before.
func parseSize(text string) (int64, error) {
	number := strings.ToUpper(strings.TrimSpace(text))
	number = strings.TrimSuffix(strings.TrimSuffix(number, "B"), "I")
	factor := int64(1)
	if at := strings.IndexAny(number, "KMGT"); at >= 0 && at == len(number)-1 {
		factor = 1 << (10 * (1 + strings.IndexByte("KMGT", number[at])))
		number = number[:at]
	}
	n, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	// What is not below 2^63 does not fit; not-a-number is not below anything.
	if err != nil || math.Signbit(n) || !(n*float64(factor) < math.MaxInt64) {
		return 0, fmt.Errorf("%.64q is not a size such as 30KB", text)
	}
	return int64(math.Ceil(n * float64(factor))), nil
}

// maxEntry is how much of a line one entry of a log holds, in bytes.
const maxEntry = 16 << 10

// logFile writes both outputs of a process as lines of JSON, {"log":"TEXT\n","stream":"stdout","time":
// "RFC 3339"}, as kubelet and the engines' clients read them. An entry whose text does not end in a
// newline is continued by the next one of its stream.
//
// Another daemon goes on at the byte where this one was killed. What has been taken is remembered in a
// memory file that the shelf keeps. It has two slots; each holds the state after a write to the log,
// and between which sizes of which file that write was. A slot is filled before its write is made: if
// the file shows that it was not made in whole, it is cut off, and the other slot, the state before,
// holds. Where nothing is kept, a killed daemon may have written what the guest then sends again.
//
// The container does not suffer from its log: what cannot be written is dropped and reported once.
type logFile struct {
	to    LogFile
	niche niche
	log   *slog.Logger

	mu       sync.Mutex
	file     *os.File // nil if there is none just now
	opened   time.Time
	memory   *os.File // nil if nothing would last
	slot     int      // of memory, that holds state
	seq      uint64
	state    logState
	finished [2]bool
	users    int // sinks that have not finished
	reported bool
	detached bool
}

// logState is how far a log is: the offsets in the streams, and the beginnings of lines before them
// that are not in the log yet.
type logState struct {
	offsets [2]uint64
	partial [2][]byte
}

// logIndex is the place of a stream in a logState.
func logIndex(kind guestio.Kind) int {
	if kind == guestio.Stderr {
		return 1
	}
	return 0
}

// openLogFile goes on with what an earlier daemon has left in the niche, or begins with the streams at
// offsets. users is how many sinks there will be.
func openLogFile(to LogFile, n niche, offsets [2]uint64, users int, log *slog.Logger) (*logFile, error) {
	l := &logFile{to: to, niche: n, log: log, users: users, state: logState{offsets: offsets}}
	if left := n.take("log"); left != nil {
		l.memory = left
		if err := l.recover(); err != nil {
			log.Warn("the log cannot be continued exactly", "file", to.Path, "error", err)
		}
		return l, nil
	}
	file, err := openLogAt(to.Path)
	if err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return nil, err
	}
	if err != nil {
		l.report(err)
	}
	l.file = file
	if n.store.Lasting() {
		fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
		if err == nil {
			l.memory = os.NewFile(uintptr(fd), "log")
			n.remove("log")
			err = l.save(l.state, logWrite{})
		}
		if err == nil {
			err = n.put(map[string]*os.File{"log": l.memory})
		}
		if err != nil {
			log.Warn("the log will not be exact behind this daemon's end", "file", to.Path, "error", err)
		}
	}
	return l, nil
}

// openLogAt opens a log to append to it. Only what is at the path itself counts, not what a link names.
func openLogAt(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o640)
	if err != nil {
		err = &os.PathError{Op: "open", Path: path, Err: err}
		switch {
		case errors.Is(err, unix.ELOOP):
			return nil, fmt.Errorf("%w: a symbolic link is in its place: %w", err, errdefs.ErrInvalidArgument)
		case errors.Is(err, unix.ENXIO), errors.Is(err, unix.EISDIR):
			return nil, fmt.Errorf("%w: it is not a regular file: %w", err, errdefs.ErrInvalidArgument)
		case errors.Is(err, os.ErrNotExist):
			return nil, fmt.Errorf("%w: the directory of a log must exist: %w", err, errdefs.ErrInvalidArgument)
		}
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return nil, fmt.Errorf("%s is not a regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// logWrite is a write to a log: the file, and its sizes before and after.
type logWrite struct {
	device, inode uint64
	before, after int64
}

// The slots of the memory file: a checksum of the rest, its length, and the rest.
const (
	logSlot   = 10 * 4096
	logHeader = 8
	logFixed  = logHeader + 8 + 2*8 + 2*4 + 4*8
)

// save fills the other slot. l.mu is held, or nobody else is there.
func (l *logFile) save(state logState, w logWrite) error {
	if l.memory == nil {
		return nil
	}
	l.seq++
	b := make([]byte, logHeader, logFixed+len(state.partial[0])+len(state.partial[1]))
	b = binary.LittleEndian.AppendUint64(b, l.seq)
	for k := range state.offsets {
		b = binary.LittleEndian.AppendUint64(b, state.offsets[k])
		b = binary.LittleEndian.AppendUint32(b, uint32(len(state.partial[k])))
	}
	for _, v := range []uint64{w.device, w.inode, uint64(w.before), uint64(w.after)} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	b = append(append(b, state.partial[0]...), state.partial[1]...)
	binary.LittleEndian.PutUint32(b[4:], uint32(len(b)-logHeader))
	binary.LittleEndian.PutUint32(b, crc32.ChecksumIEEE(b[4:]))
	slot := 1 - l.slot
	if _, err := l.memory.WriteAt(b, int64(slot)*logSlot); err != nil {
		return fmt.Errorf("cannot note how far the log is: %w", err)
	}
	l.slot = slot
	return nil
}

type savedLog struct {
	slot  int
	seq   uint64
	state logState
	write logWrite
}

// load reads a slot. ok is false if it was not filled in whole.
func (l *logFile) load(slot int) (s savedLog, ok bool) {
	b := make([]byte, logSlot)
	n, _ := l.memory.ReadAt(b, int64(slot)*logSlot)
	if n < logFixed {
		return s, false
	}
	length := int(binary.LittleEndian.Uint32(b[4:]))
	if length < logFixed-logHeader || length > n-logHeader || crc32.ChecksumIEEE(b[4:logHeader+length]) != binary.LittleEndian.Uint32(b) {
		return s, false
	}
	b = b[logHeader : logHeader+length]
	number := func() uint64 {
		v := binary.LittleEndian.Uint64(b)
		b = b[8:]
		return v
	}
	s.slot, s.seq = slot, number()
	var lengths [2]int
	for k := range lengths {
		s.state.offsets[k] = number()
		lengths[k] = int(binary.LittleEndian.Uint32(b))
		b = b[4:]
	}
	s.write = logWrite{device: number(), inode: number(), before: int64(number()), after: int64(number())}
	if lengths[0] > maxEntry || lengths[1] > maxEntry || lengths[0]+lengths[1] != len(b) {
		return s, false
	}
	s.state.partial[0], s.state.partial[1] = b[:lengths[0]:lengths[0]], b[lengths[0]:]
	return s, true
}

// recover finds out how far an earlier daemon got.
func (l *logFile) recover() error {
	newer, ok := l.load(0)
	older, ok2 := l.load(1)
	if !ok || ok2 && older.seq > newer.seq {
		newer, older, ok, ok2 = older, newer, ok2, ok
	}
	if !ok {
		return errors.New("what was noted of it is damaged")
	}
	l.seq = newer.seq
	done, err := l.wasWritten(newer.write)
	if err != nil {
		l.report(err)
	}
	if !done && ok2 {
		newer = older
	}
	l.slot, l.state = newer.slot, newer.state
	return nil
}

// wasWritten tells whether a write was made, and undoes it if it was made in part. A file that was
// rotated meanwhile had been written to in whole.
func (l *logFile) wasWritten(w logWrite) (bool, error) {
	if w.before == w.after {
		return true, nil
	}
	fd, err := unix.Open(l.to.Path, unix.O_WRONLY|unix.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return true, nil
	}
	if err != nil {
		return true, &os.PathError{Op: "open", Path: l.to.Path, Err: err}
	}
	file := os.NewFile(uintptr(fd), l.to.Path)
	defer file.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return true, &os.PathError{Op: "stat", Path: l.to.Path, Err: err}
	}
	if st.Dev != w.device || st.Ino != w.inode || st.Size < w.before || st.Size >= w.after {
		return true, nil
	}
	return false, file.Truncate(w.before)
}

// report says once what is wrong with the log. l.mu is held, or nobody else is there.
func (l *logFile) report(err error) {
	if !l.reported {
		l.log.Error("output is missing in the container's log", "file", l.to.Path, "error", err)
	}
	l.reported = true
}

// ready sees to it that the file is there, and returns its identity and size. l.mu is held.
func (l *logFile) ready() (w logWrite, ok bool) {
	const pause = time.Second // between attempts to open it
	var st unix.Stat_t
	for range 2 {
		if l.file != nil {
			fd, _, err := control(l.file)
			if err == nil {
				err = unix.Fstat(fd, &st)
			}
			if err == nil && st.Nlink > 0 {
				return logWrite{device: st.Dev, inode: st.Ino, before: st.Size, after: st.Size}, true
			}
			l.file.Close()
			l.file = nil
		}
		if time.Since(l.opened) < pause {
			break
		}
		l.opened = time.Now()
		file, err := openLogAt(l.to.Path)
		if err != nil {
			l.report(err)
			break
		}
		l.file = file
	}
	return logWrite{}, false
}

// put makes a state the current one, with the text that belongs to it in the log. l.mu is held.
func (l *logFile) put(state logState, text []byte) {
	var w logWrite
	if len(text) > 0 {
		var ok bool
		if w, ok = l.ready(); ok {
			w.after += int64(len(text))
		} else {
			l.report(errors.New("the file is not there"))
			text = nil
		}
	}
	if err := l.save(state, w); err != nil {
		l.report(err)
	}
	l.state = state
	if len(text) == 0 {
		return
	}
	if _, err := l.file.Write(text); err != nil {
		// Half a line would spoil the one after it.
		l.report(errors.Join(err, l.file.Truncate(w.before)))
		if err := l.save(state, logWrite{}); err != nil {
			l.report(err)
		}
	}
}

// write takes output.
func (l *logFile) write(k int, p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.detached {
		return 0, os.ErrClosed
	}
	for rest := p; len(rest) > 0 && !l.finished[k]; {
		size := l.size()
		next := l.state
		var text []byte
		for len(rest) > 0 {
			e, n := nextEntry(next.partial[k], rest)
			var line []byte
			if e.full {
				line = encodeEntry(k, e.text)
			}
			if l.to.MaxSize > 0 && e.full && size+int64(len(text)+len(line)) > l.to.MaxSize {
				if len(text) > 0 {
					break // that first
				}
				if size > 0 {
					l.rotate()
					size = 0
				}
			}
			text = append(text, line...)
			next.partial[k] = e.partial
			next.offsets[k] += uint64(n)
			rest = rest[n:]
		}
		l.put(next, text)
	}
	return len(p), nil
}

// size is that of the file. l.mu is held.
func (l *logFile) size() int64 {
	if l.to.MaxSize == 0 {
		return 0 // does not matter
	}
	w, _ := l.ready()
	return w.before
}

// entry is what a piece of a stream makes of a line.
type entry struct {
	full    bool   // there is text for the log
	text    []byte // of an entry
	partial []byte // the beginning of the next one
}

// nextEntry returns what the beginning of a line and n bytes of what follows it make.
func nextEntry(partial, p []byte) (e entry, n int) {
	room := min(maxEntry-len(partial), len(p))
	if end := bytes.IndexByte(p[:room], '\n'); end >= 0 {
		return entry{full: true, text: join(partial, p[:end+1])}, end + 1
	}
	whole := join(partial, p[:room])
	if len(whole) < maxEntry {
		return entry{partial: whole}, room
	}
	cut := wholeRunes(whole)
	return entry{full: true, text: whole[:cut], partial: whole[cut:]}, room
}

func join(a, b []byte) []byte { return append(append(make([]byte, 0, len(a)+len(b)), a...), b...) }

// wholeRunes is how much of b does not end within a character.
func wholeRunes(b []byte) int {
	for back := 1; back < utf8.UTFMax && back <= len(b); back++ {
		if at := len(b) - back; utf8.RuneStart(b[at]) {
			if !utf8.FullRune(b[at:]) {
				return at
			}
			break
		}
	}
	return len(b)
}

func encodeEntry(k int, text []byte) []byte {
	b := bytes.NewBufferString(`{"log":`)
	e := json.NewEncoder(b)
	e.SetEscapeHTML(false)
	_ = e.Encode(string(text)) // which replaces what is not UTF-8
	b.Truncate(b.Len() - 1)    // the encoder's newline
	stream := "stdout"
	if k == 1 {
		stream = "stderr"
	}
	fmt.Fprintf(b, `,"stream":"%s","time":"%s"}`+"\n", stream, time.Now().UTC().Format(time.RFC3339Nano))
	return b.Bytes()
}

// rotate makes room for a new file: it is called with everything written that was noted. l.mu is held.
func (l *logFile) rotate() {
	if l.file == nil {
		return
	}
	if l.to.MaxFiles < 2 {
		if err := l.file.Truncate(0); err != nil {
			l.report(err)
		}
		return
	}
	numbered := func(n int) string { return fmt.Sprintf("%s.%d", l.to.Path, n) }
	// Up to the first gap, which a daemon that was killed in the middle may have left.
	last := 1
	for last < l.to.MaxFiles-1 {
		if _, err := os.Lstat(numbered(last)); err != nil {
			break
		}
		last++
	}
	for n := last - 1; n >= 1; n-- {
		if err := os.Rename(numbered(n), numbered(n+1)); err != nil {
			l.report(err)
			return
		}
	}
	if err := os.Rename(l.to.Path, numbered(1)); err != nil {
		l.report(err)
		return
	}
	l.file.Close()
	l.file = nil
	l.opened = time.Time{}
}

// finish writes what is left of a stream's last line.
func (l *logFile) finish(k int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.finished[k] || l.detached {
		return
	}
	if len(l.state.partial[k]) > 0 {
		next := l.state
		next.partial[k] = nil
		l.put(next, encodeEntry(k, l.state.partial[k]))
	}
	l.finished[k] = true
	if l.users--; l.users == 0 {
		l.closeFiles()
		l.niche.remove("log")
	}
}

// closeFiles is called with l.mu held.
func (l *logFile) closeFiles() {
	for _, f := range []**os.File{&l.file, &l.memory} {
		if *f != nil {
			(*f).Close()
			*f = nil
		}
	}
}

// logSink is one of the streams of a log.
type logSink struct {
	file  *logFile
	index int
}

func (s logSink) Write(p []byte) (int, error) { return s.file.write(s.index, p) }

func (s logSink) position() uint64 {
	s.file.mu.Lock()
	defer s.file.mu.Unlock()
	return s.file.state.offsets[s.index]
}

func (s logSink) resume(offset uint64) {
	s.file.mu.Lock()
	defer s.file.mu.Unlock()
	if offset > s.file.state.offsets[s.index] {
		next := s.file.state
		next.offsets[s.index] = offset
		s.file.put(next, nil)
	}
}

// flush has nothing to do: Write returns when the file has it all.
func (s logSink) flush(context.Context) error {
	s.file.mu.Lock()
	defer s.file.mu.Unlock()
	if s.file.detached {
		return os.ErrClosed
	}
	return nil
}

// abandon discards nothing: a file takes what there is.
func (s logSink) abandon() {}

func (s logSink) detach() {
	s.file.mu.Lock()
	defer s.file.mu.Unlock()
	s.file.detached = true
}

func (s logSink) finish() { s.file.finish(s.index) }

func (s logSink) close() {
	s.file.mu.Lock()
	defer s.file.mu.Unlock()
	s.file.detached = true
	s.file.closeFiles()
	s.file.niche.remove("log")
}
