package rpm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// Sizes and tags of the format of packages, version 3.
const (
	leadSize  = 96
	introSize = 16 // of a header: magic, count of entries, bytes of their data
	entrySize = 16

	tagHeaderSignature  = 268  // of the header, by RSA or EdDSA
	tagPackageSignature = 1002 // of header and payload
)

var (
	leadMagic   = []byte{0xed, 0xab, 0xee, 0xdb}
	headerMagic = []byte{0x8e, 0xad, 0xe8, 0x01}
)

// sections are a package's parts, as they are signed.
type sections struct {
	header, payload                   []byte
	headerSignature, packageSignature []byte // nil if it has none
}

// Signed says whether a package has signatures. It does not verify them, for which rpm -K is.
func Signed(path string) (bool, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	s, err := split(data)
	if err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	return s.headerSignature != nil && s.packageSignature != nil, nil
}

var errNoPackage = errors.New("this is no RPM package, or not a whole one")

func split(data []byte) (sections, error) {
	if len(data) < leadSize || !bytes.HasPrefix(data, leadMagic) {
		return sections{}, errNoPackage
	}
	signatures, err := header(data[leadSize:])
	if err != nil {
		return sections{}, err
	}
	// Signatures are padded, so that the header begins at a multiple of 8.
	at := leadSize + (len(signatures)+7)/8*8
	if at > len(data) {
		return sections{}, errNoPackage
	}
	main, err := header(data[at:])
	if err != nil {
		return sections{}, err
	}
	s := sections{header: main, payload: data[at+len(main):]}
	if s.headerSignature, err = binaryTag(signatures, tagHeaderSignature); err != nil {
		return sections{}, err
	}
	s.packageSignature, err = binaryTag(signatures, tagPackageSignature)
	return s, err
}

// header returns the header that data begins with.
func header(data []byte) ([]byte, error) {
	if len(data) < introSize || !bytes.HasPrefix(data, headerMagic) {
		return nil, errNoPackage
	}
	entries, bytes := binary.BigEndian.Uint32(data[8:]), binary.BigEndian.Uint32(data[12:])
	size := introSize + int64(entries)*entrySize + int64(bytes)
	if size > int64(len(data)) {
		return nil, errNoPackage
	}
	return data[:size], nil
}

// binaryTag returns the value of a tag that is binary data, nil if the header does not have it.
func binaryTag(header []byte, tag uint32) ([]byte, error) {
	entries := int(binary.BigEndian.Uint32(header[8:]))
	store := header[introSize+entries*entrySize:]
	for i := range entries {
		e := header[introSize+i*entrySize:]
		if binary.BigEndian.Uint32(e) != tag {
			continue
		}
		offset, count := int64(binary.BigEndian.Uint32(e[8:])), int64(binary.BigEndian.Uint32(e[12:]))
		if offset+count > int64(len(store)) {
			return nil, errNoPackage
		}
		return store[offset : offset+count], nil
	}
	return nil, nil
}

// signed is the data of the two signatures.
func (s sections) signed() (header, whole io.Reader) {
	return bytes.NewReader(s.header), io.MultiReader(bytes.NewReader(s.header), bytes.NewReader(s.payload))
}
