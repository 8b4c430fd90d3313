package console

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
)

// Limits of an archive that is unpacked into the guest's memory.
const (
	maxUnpacked = 64 << 20
	maxEntries  = 4096
	maxName     = 4096
)

// unpack unpacks a gzip-compressed cpio archive (newc, as the kernel reads) into root. It knows
// directories, files and symbolic links; hard links are not resolved.
func unpack(archive io.Reader, root *os.Root) error {
	packed, err := gzip.NewReader(archive)
	if err != nil {
		return err
	}
	r := &cpioReader{r: io.LimitReader(packed, maxUnpacked)}
	for range maxEntries {
		e, err := r.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := e.create(root); err != nil {
			return err
		}
	}
	return fmt.Errorf("more than %d entries", maxEntries)
}

// entry is one member of an archive. content is valid until the next one is read.
type entry struct {
	name    string
	mode    uint32
	content io.Reader
}

const (
	typeMask    = 0o170000
	typeDir     = 0o040000
	typeFile    = 0o100000
	typeSymlink = 0o120000
)

func (e *entry) create(root *os.Root) error {
	if e.name == "." {
		return nil
	}
	if !filepath.IsLocal(e.name) {
		return fmt.Errorf("the entry %q leaves its folder", e.name)
	}
	perm := os.FileMode(e.mode & 0o777)
	if e.mode&typeMask == typeDir {
		return root.MkdirAll(e.name, perm)
	}
	if err := root.MkdirAll(filepath.Dir(e.name), 0o755); err != nil {
		return err
	}
	switch e.mode & typeMask {
	case typeFile:
		f, err := root.OpenFile(e.name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, perm)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, e.content)
		return errors.Join(err, f.Close())
	case typeSymlink:
		target, err := io.ReadAll(io.LimitReader(e.content, maxName))
		if err != nil {
			return err
		}
		return root.Symlink(string(target), e.name)
	}
	return fmt.Errorf("the entry %q is of type %o", e.name, e.mode&typeMask)
}

// cpioReader reads the newc format: headers of 110 characters, then the name and the content,
// each padded to a multiple of 4.
type cpioReader struct {
	r   io.Reader
	at  int64
	cur *io.LimitedReader
}

func (c *cpioReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.at += int64(n)
	return n, err
}

func (c *cpioReader) pad() error {
	_, err := io.CopyN(io.Discard, c, -c.at&3)
	return err
}

const (
	newcHeader = 110
	trailer    = "TRAILER!!!"
)

// next returns io.EOF at the archive's end.
func (c *cpioReader) next() (*entry, error) {
	if c.cur != nil {
		if _, err := io.Copy(io.Discard, c.cur); err != nil {
			return nil, err
		}
		if c.cur.N > 0 {
			return nil, io.ErrUnexpectedEOF
		}
		if err := c.pad(); err != nil {
			return nil, noEOF(err)
		}
	}
	var head [newcHeader]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return nil, noEOF(err)
	}
	if m := string(head[:6]); m != "070701" && m != "070702" {
		return nil, fmt.Errorf("a header of the archive begins with %q", m)
	}
	field := func(i int) (int64, error) {
		n, err := strconv.ParseUint(string(head[6+8*i:14+8*i]), 16, 32)
		if err != nil {
			return 0, fmt.Errorf("a header of the archive is damaged: %w", err)
		}
		return int64(n), nil
	}
	mode, err1 := field(1)
	size, err2 := field(6)
	nameSize, err3 := field(11)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	if nameSize < 1 || nameSize > maxName {
		return nil, fmt.Errorf("a name of %d characters in the archive", nameSize)
	}
	name := make([]byte, nameSize)
	if _, err := io.ReadFull(c, name); err != nil {
		return nil, noEOF(err)
	}
	if err := c.pad(); err != nil {
		return nil, noEOF(err)
	}
	e := &entry{name: string(name[:nameSize-1]), mode: uint32(mode)}
	if e.name == trailer {
		return nil, io.EOF
	}
	c.cur = &io.LimitedReader{R: c, N: size}
	e.content = c.cur
	return e, nil
}

// noEOF makes the end of the input an error: an archive ends with its trailer.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
