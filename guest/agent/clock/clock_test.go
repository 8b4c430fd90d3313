package clock

import (
	"encoding/binary"
	"testing"
)

func TestSetRefusesNonsense(t *testing.T) {
	for _, nanos := range []int64{0, -1, 1, earliest - 1} {
		if _, err := Set(nanos); err == nil {
			t.Errorf("%d was accepted", nanos)
		}
	}
}

func TestPoolInfo(t *testing.T) {
	b, err := poolInfo(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	if bits, size := binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint32(b[4:]); bits != 256 || size != 32 || len(b) != 40 {
		t.Errorf("%d bits, %d bytes, %d in all", bits, size, len(b))
	}
	for _, n := range []int{0, 15, maxSeed + 1} {
		if err := Seed(make([]byte, n)); err == nil {
			t.Errorf("a seed of %d bytes was accepted", n)
		}
	}
}
