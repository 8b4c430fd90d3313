package generate

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestGenerated fails when somebody changed a .proto file, or the code beside it, alone.
func TestGenerated(t *testing.T) {
	root := filepath.Join("..", "..")
	files, err := Files(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < len(Sources) {
		t.Fatalf("only %d files were generated from %v", len(files), Sources)
	}
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what its .proto generates: run go tool mage generate", name)
		}
	}
}
