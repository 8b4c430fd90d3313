package qmp

import (
	"bufio"
	"bytes"
	"testing"
)

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"QMP":{"version":{},"capabilities":[]}}`))
	f.Add([]byte(`{"return":{},"id":"1"}`))
	f.Add([]byte(`{"error":{"class":"GenericError","desc":"x"},"id":3}`))
	f.Add([]byte(`{"event":"STOP","data":{"a":[1]},"timestamp":{"seconds":1}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		line, err := readLine(bufio.NewReaderSize(bytes.NewReader(append(b, '\n')), 16))
		if err != nil {
			return
		}
		m, err := decode(line)
		if err != nil {
			return
		}
		if m.Greeting == nil && m.Return == nil && m.Error == nil && m.Event == "" {
			t.Fatal("a message that says nothing")
		}
		m.id()
	})
}
