package handover

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// tableSize is how large a table may become before it is worth replacing, in bytes.
const tableSize = 64 << 10

// tableName begins the names of tables; their generation follows. No number begins like that.
const tableName = "names-"

func isTable(name string) bool { return strings.HasPrefix(name, tableName) }

// table says, in a memory file, what the numbers stand for under which descriptors are kept: a line
// for each that was ever given, of the number and the name. It only grows; a new generation takes its
// place when it has become too large.
type table struct {
	file       *os.File
	generation uint64
	size       int64
	last       uint64
	lines      [][2]string // as found by openTable
}

func newTable(generation uint64) (*table, error) {
	fd, err := unix.MemfdCreate("names", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot make the memory file of a table: %w", err)
	}
	name := tableName + strconv.FormatUint(generation, 36)
	return &table{file: os.NewFile(uintptr(fd), name), generation: generation}, nil
}

// openTable reads what another daemon has left. A line that it died in the middle of does not count, as
// its descriptor was never kept: the next one is written over it.
func openTable(f *os.File) (*table, error) {
	t := &table{file: f}
	generation, err := strconv.ParseUint(strings.TrimPrefix(f.Name(), tableName), 36, 64)
	if err != nil {
		return nil, fmt.Errorf("the table has the name %q: %w", f.Name(), err)
	}
	t.generation = generation
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("cannot read the table of descriptors: %w", err)
	}
	text := make([]byte, info.Size())
	if _, err := f.ReadAt(text, 0); err != nil && len(text) > 0 {
		return nil, fmt.Errorf("cannot read the table of descriptors: %w", err)
	}
	t.size = int64(bytes.LastIndexByte(text, '\n') + 1)
	for line := range strings.Lines(string(text[:t.size])) {
		number, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		n, err := strconv.ParseUint(number, 36, 64)
		if err != nil || checkName(name) != nil {
			return nil, fmt.Errorf("the table of descriptors has the line %q", line)
		}
		t.last = max(t.last, n)
		t.lines = append(t.lines, [2]string{number, name})
	}
	return t, nil
}

// names is what the numbers stood for when the table was opened.
func (t *table) names() map[string]string {
	names := make(map[string]string, len(t.lines))
	for _, line := range t.lines {
		names[line[0]] = line[1]
	}
	t.lines = nil
	return names
}

func (t *table) add(number, name string) error {
	line := number + " " + name + "\n"
	if _, err := t.file.WriteAt([]byte(line), t.size); err != nil {
		return fmt.Errorf("cannot add to the table of descriptors: %w", err)
	}
	t.size += int64(len(line))
	return nil
}
