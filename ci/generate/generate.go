// Package generate makes the Go code that stands beside the .proto files of this module. It
// compiles them with a Go library and runs the generator plug-ins that go.mod pins, so that the
// result depends on nothing of the machine.
package generate

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/pluginpb"
)

// Sources are the .proto files, relative to the module's root.
var Sources = []string{"guest/protocol/guest.proto", "sandboxer/controller/isulad/isulad.proto"}

// plugins are run by "go tool" in this order.
var plugins = []string{"protoc-gen-go", "protoc-gen-go-ttrpc"}

// Files returns the generated files of root's Sources: path relative to root, content.
func Files(ctx context.Context, root string) (map[string][]byte, error) {
	compiler := protocompile.Compiler{
		Resolver: protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{root}}),
		// The generators copy the comments into the code.
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	compiled, err := compiler.Compile(ctx, Sources...)
	if err != nil {
		return nil, fmt.Errorf("cannot compile %v: %w", Sources, err)
	}
	request := &pluginpb.CodeGeneratorRequest{
		FileToGenerate: Sources,
		Parameter:      proto.String("paths=source_relative"),
	}
	// Plug-ins want a file's imports before the file.
	added := map[string]bool{}
	var add func(protoreflect.FileDescriptor)
	add = func(file protoreflect.FileDescriptor) {
		if added[file.Path()] {
			return
		}
		added[file.Path()] = true
		for i := range file.Imports().Len() {
			add(file.Imports().Get(i).FileDescriptor)
		}
		request.ProtoFile = append(request.ProtoFile, protoutil.ProtoFromFileDescriptor(file))
	}
	for _, file := range compiled {
		add(file)
	}
	input, err := proto.Marshal(request)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the generator's request: %w", err)
	}
	files := map[string][]byte{}
	for _, plugin := range plugins {
		var stdout, stderr bytes.Buffer
		cmd := exec.CommandContext(ctx, "go", "tool", plugin)
		cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = root, bytes.NewReader(input), &stdout, &stderr
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("cannot run %s: %w: %s", plugin, err, stderr.String())
		}
		var response pluginpb.CodeGeneratorResponse
		if err := proto.Unmarshal(stdout.Bytes(), &response); err != nil {
			return nil, fmt.Errorf("cannot decode what %s answered: %w", plugin, err)
		}
		if response.Error != nil {
			return nil, fmt.Errorf("%s: %s", plugin, response.GetError())
		}
		for _, file := range response.File {
			files[file.GetName()] = []byte(file.GetContent())
		}
	}
	return files, nil
}

// Write generates and writes the files below root.
func Write(ctx context.Context, root string) error {
	files, err := Files(ctx, root)
	if err != nil {
		return err
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(root, name), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}
