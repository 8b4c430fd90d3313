// Package image makes the container image that the tests run, on the machine, and puts it into
// containerd: no registry is involved.
package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Name is what the image is called in containerd: the name that the guide's container uses.
const Name = "docker.io/library/busybox:latest"

// Namespace is the containerd namespace in which CRI looks for images.
const Namespace = "k8s.io"

// Image is an image of one layer, complete in memory.
type Image struct {
	Name     string
	manifest blob
	config   blob
	layer    blob
}

type blob struct {
	descriptor ocispec.Descriptor
	data       []byte
}

func newBlob(mediaType string, data []byte) blob {
	return blob{
		descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))},
		data:       data,
	}
}

// Busybox makes an image from this machine's statically linked busybox. The same binary gives the
// same image, byte for byte.
func Busybox() (*Image, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("cannot make an image: %w; install busybox (on Debian the package busybox-static)", err)
	}
	binary, err := staticBinary(path)
	if err != nil {
		return nil, err
	}
	applets, err := exec.Command(path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("cannot list the applets of %s: %w", path, err)
	}
	layer, diffID, err := layer(binary, strings.Fields(string(applets)))
	if err != nil {
		return nil, err
	}
	image := &Image{Name: Name, layer: newBlob(ocispec.MediaTypeImageLayerGzip, layer)}
	config, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{Architecture: runtime.GOARCH, OS: "linux"},
		Config:   ocispec.ImageConfig{Env: []string{"PATH=/bin:/usr/bin"}, Cmd: []string{"sh"}},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}},
	})
	if err != nil {
		return nil, err
	}
	image.config = newBlob(ocispec.MediaTypeImageConfig, config)
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    image.config.descriptor,
		Layers:    []ocispec.Descriptor{image.layer.descriptor},
	})
	if err != nil {
		return nil, err
	}
	image.manifest = newBlob(ocispec.MediaTypeImageManifest, manifest)
	return image, nil
}

// staticBinary reads an executable and refuses one that needs a dynamic linker, which the image
// would not have.
func staticBinary(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read busybox: %w", err)
	}
	file, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%s is not an ELF executable: %w", path, err)
	}
	for _, program := range file.Progs {
		if program.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%s is linked dynamically; install one that is static (on Debian the package busybox-static)", path)
		}
	}
	return data, nil
}

// layer makes the root file system: busybox, its applets as hard links, and a few accounts.
func layer(busybox []byte, applets []string) (compressed []byte, diffID digest.Digest, err error) {
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	sum := digest.SHA256.Digester()
	archive := tar.NewWriter(io.MultiWriter(zip, sum.Hash()))
	write := func(header tar.Header, content []byte) {
		if err != nil {
			return
		}
		header.Format, header.Size = tar.FormatUSTAR, int64(len(content))
		if err = archive.WriteHeader(&header); err == nil {
			_, err = archive.Write(content)
		}
	}
	for _, dir := range []string{"bin", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr", "usr/bin", "var"} {
		mode := int64(0o755)
		if dir == "tmp" {
			mode = 0o1777
		}
		write(tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: mode}, nil)
	}
	write(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, busybox)
	for _, applet := range applets {
		if applet != "busybox" {
			write(tar.Header{Typeflag: tar.TypeLink, Name: "bin/" + applet, Linkname: "bin/busybox", Mode: 0o755}, nil)
		}
	}
	write(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644},
		[]byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	write(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644},
		[]byte("root:x:0:\nnogroup:x:65534:\n"))
	if err == nil {
		err = errors.Join(archive.Close(), zip.Close())
	}
	if err != nil {
		return nil, "", fmt.Errorf("cannot make the layer: %w", err)
	}
	return out.Bytes(), sum.Digest(), nil
}

// Archive is the image as "docker save" writes it, for engines that load such a file.
func (i *Image) Archive() ([]byte, error) {
	config := i.config.descriptor.Digest.Encoded() + ".json"
	manifest, err := json.Marshal([]map[string]any{{
		"Config": config, "RepoTags": []string{i.Name}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return nil, fmt.Errorf("cannot archive %s: %w", i.Name, err)
	}
	unzipped, err := gzip.NewReader(bytes.NewReader(i.layer.data))
	if err != nil {
		return nil, fmt.Errorf("cannot archive %s: %w", i.Name, err)
	}
	layer, err := io.ReadAll(unzipped)
	if err != nil {
		return nil, fmt.Errorf("cannot archive %s: %w", i.Name, err)
	}
	var out bytes.Buffer
	archive := tar.NewWriter(&out)
	for _, file := range []struct {
		name string
		data []byte
	}{{config, i.config.data}, {"layer.tar", layer}, {"manifest.json", manifest}} {
		header := &tar.Header{Typeflag: tar.TypeReg, Format: tar.FormatUSTAR, Name: file.name, Mode: 0o644, Size: int64(len(file.data))}
		if err = archive.WriteHeader(header); err == nil {
			_, err = archive.Write(file.data)
		}
		if err != nil {
			return nil, fmt.Errorf("cannot archive %s: %w", i.Name, err)
		}
	}
	if err := archive.Close(); err != nil {
		return nil, fmt.Errorf("cannot archive %s: %w", i.Name, err)
	}
	return out.Bytes(), nil
}

// Unpack makes the image's root file system in a directory, which must exist.
func (i *Image) Unpack(dir string) error {
	fail := func(err error) error { return fmt.Errorf("cannot unpack %s into %s: %w", i.Name, dir, err) }
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fail(err)
	}
	defer root.Close()
	unzipped, err := gzip.NewReader(bytes.NewReader(i.layer.data))
	if err != nil {
		return fail(err)
	}
	for archive := tar.NewReader(unzipped); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fail(err)
		}
		name := strings.TrimSuffix(header.Name, "/")
		switch header.Typeflag {
		case tar.TypeDir:
			err = root.Mkdir(name, 0o755)
		case tar.TypeLink:
			err = root.Link(header.Linkname, name)
		case tar.TypeReg:
			var content []byte
			if content, err = io.ReadAll(archive); err == nil {
				err = root.WriteFile(name, content, 0o644)
			}
		default:
			err = fmt.Errorf("%s is of type %c", header.Name, header.Typeflag)
		}
		if err == nil && header.Typeflag != tar.TypeLink {
			// Mkdir and WriteFile apply the umask.
			err = root.Chmod(name, os.FileMode(header.Mode&0o777)|sticky(header.Mode))
		}
		if err != nil {
			return fail(err)
		}
	}
}

// sticky is the sticky bit of a mode as archives have it.
func sticky(mode int64) os.FileMode {
	if mode&0o1000 != 0 {
		return os.ModeSticky
	}
	return 0
}

// Import puts the image into the containerd behind conn. It succeeds if the image is there already.
func (i *Image) Import(ctx context.Context, conn grpc.ClientConnInterface) error {
	ctx = metadata.AppendToOutgoingContext(ctx, "containerd-namespace", Namespace)
	// The lease keeps the blobs from the garbage collector until the image refers to them.
	leases := leasesapi.NewLeasesClient(conn)
	lease, err := leases.Create(ctx, &leasesapi.CreateRequest{})
	if err != nil {
		return fmt.Errorf("cannot import %s: cannot get a lease: %w", i.Name, err)
	}
	defer leases.Delete(ctx, &leasesapi.DeleteRequest{ID: lease.Lease.ID})
	leased := metadata.AppendToOutgoingContext(ctx, "containerd-lease", lease.Lease.ID)

	content := contentapi.NewContentClient(conn)
	references := map[string]string{
		"containerd.io/gc.ref.content.config": i.config.descriptor.Digest.String(),
		"containerd.io/gc.ref.content.l.0":    i.layer.descriptor.Digest.String(),
	}
	for _, b := range []struct {
		blob
		labels map[string]string
	}{{blob: i.layer}, {blob: i.config}, {i.manifest, references}} {
		if err := write(leased, content, b.blob, b.labels); err != nil {
			return fmt.Errorf("cannot import %s: %w", i.Name, err)
		}
	}
	_, err = imagesapi.NewImagesClient(conn).Create(leased, &imagesapi.CreateImageRequest{Image: &imagesapi.Image{
		Name: i.Name,
		Target: &types.Descriptor{
			MediaType: i.manifest.descriptor.MediaType,
			Digest:    i.manifest.descriptor.Digest.String(),
			Size:      i.manifest.descriptor.Size,
		},
	}})
	if err != nil && status.Code(err) != codes.AlreadyExists {
		return fmt.Errorf("cannot import %s: %w", i.Name, err)
	}
	return nil
}

// write stores one blob. It is sent in pieces below gRPC's limit for a message.
func write(ctx context.Context, content contentapi.ContentClient, b blob, labels map[string]string) error {
	stream, err := content.Write(ctx)
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", b.descriptor.Digest, err)
	}
	defer stream.CloseSend()
	const piece = 1 << 20
	for offset := 0; ; offset += piece {
		end := min(offset+piece, len(b.data))
		request := &contentapi.WriteContentRequest{
			Action: contentapi.WriteAction_WRITE,
			Ref:    "import-" + b.descriptor.Digest.String(),
			Total:  b.descriptor.Size, Expected: b.descriptor.Digest.String(),
			Offset: int64(offset), Data: b.data[offset:end],
		}
		if end == len(b.data) {
			request.Action, request.Labels = contentapi.WriteAction_COMMIT, labels
		}
		if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("cannot write %s: %w", b.descriptor.Digest, err)
		}
		if _, err := stream.Recv(); err != nil {
			if status.Code(err) == codes.AlreadyExists {
				return nil
			}
			return fmt.Errorf("cannot write %s: %w", b.descriptor.Digest, err)
		}
		if end == len(b.data) {
			return nil
		}
	}
}
