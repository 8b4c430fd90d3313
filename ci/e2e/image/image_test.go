package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestLayerIsReproducibleAndComplete(t *testing.T) {
	first, diffID, err := layer([]byte("a program"), []string{"busybox", "ls", "sh"})
	if err != nil {
		t.Fatal(err)
	}
	second, _, err := layer([]byte("a program"), []string{"busybox", "ls", "sh"})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		t.Error("the same input gives different layers")
	}
	unzipped, err := gzip.NewReader(bytes.NewReader(first))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(unzipped)
	if err != nil {
		t.Fatal(err)
	}
	if got := digest.FromBytes(plain); got != diffID {
		t.Errorf("the layer's diff id is %s, said to be %s", got, diffID)
	}
	links := map[string]string{}
	for archive := tar.NewReader(bytes.NewReader(plain)); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		links[header.Name] = header.Linkname
	}
	for _, name := range []string{"bin/ls", "bin/sh"} {
		if links[name] != "bin/busybox" {
			t.Errorf("%s is no link to busybox: %q", name, links[name])
		}
	}
	for _, name := range []string{"bin/busybox", "etc/passwd", "tmp/"} {
		if _, there := links[name]; !there {
			t.Errorf("%s is missing", name)
		}
	}
}

func TestStaticBinaryRefusesOthers(t *testing.T) {
	script := filepath.Join(t.TempDir(), "busybox")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := staticBinary(script); err == nil || !strings.Contains(err.Error(), "ELF") {
		t.Errorf("a script is accepted: %v", err)
	}
}

func TestUnpack(t *testing.T) {
	image, err := Busybox()
	if err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	if err := image.Unpack(dir); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"bin/sh": 0o755, "tmp": os.ModeDir | os.ModeSticky | 0o777, "etc/passwd": 0o644} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if err := image.Unpack(dir); err == nil {
		t.Error("a root file system is unpacked over another")
	}
}

// The archive holds what its manifest names, and the layer is the one that the configuration names.
func TestArchive(t *testing.T) {
	busybox, err := Busybox()
	if err != nil {
		t.Skip(err)
	}
	data, err := busybox.Archive()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for archive := tar.NewReader(bytes.NewReader(data)); ; {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(archive); err != nil {
			t.Fatal(err)
		}
	}
	var manifest []struct {
		Config           string
		RepoTags, Layers []string
	}
	if err := json.Unmarshal(files["manifest.json"], &manifest); err != nil || len(manifest) != 1 || len(manifest[0].Layers) != 1 {
		t.Fatalf("the manifest is %s: %v", files["manifest.json"], err)
	}
	var config ocispec.Image
	if err := json.Unmarshal(files[manifest[0].Config], &config); err != nil {
		t.Fatal(err)
	}
	if got := digest.FromBytes(files[manifest[0].Layers[0]]); len(config.RootFS.DiffIDs) != 1 || got != config.RootFS.DiffIDs[0] || manifest[0].RepoTags[0] != Name {
		t.Errorf("the layer is %s, the configuration names %v; the tags are %q", got, config.RootFS.DiffIDs, manifest[0].RepoTags)
	}
}
