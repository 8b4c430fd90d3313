// The command console makes the archive of the debug console's tools: u-root's commands as one
// busybox, with a link for each, in a compressed cpio archive. The agent unpacks it when somebody
// opens the console, so that it costs a guest no more than its compressed size before.
//
// The commands are the tools of this module's go.mod. It is a module of its own because nothing
// that it requires is part of the appliance's own programs.
//
// It must run in this folder: go run . ARCHITECTURE ARCHIVE
package main

import (
	"compress/gzip"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/gobusybox/src/pkg/bb"
	"github.com/u-root/gobusybox/src/pkg/golang"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/u-root/uio/ulog"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("console: ")
	if len(os.Args) != 3 {
		log.Fatal("usage: go run . ARCHITECTURE ARCHIVE")
	}
	if err := pack(os.Args[1], os.Args[2]); err != nil {
		log.Fatalf("cannot make the console's archive: %v", err)
	}
}

func pack(arch, archive string) error {
	commands, err := tools()
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "console-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	binary := filepath.Join(work, "bb")
	// The busybox generator looks for the go command in its own GOROOT, which a program built with
	// -trimpath does not know.
	goroot, err := goEnv("GOROOT")
	if err != nil {
		return err
	}
	err = bb.BuildBusybox(ulog.Null, &bb.Opts{
		Env:          golang.Default(golang.DisableCGO(), golang.WithGOOS("linux"), golang.WithGOARCH(arch), golang.WithGOROOT(goroot)),
		GenSrcDir:    filepath.Join(work, "src"),
		CommandPaths: commands,
		BinaryPath:   binary,
		// Without inlining the binary is a little smaller, but the standard library has to be
		// compiled anew for it.
		GoBuildOpts: &golang.BuildOpts{EnableInlining: true},
	})
	if err != nil {
		return err
	}
	out, err := os.Create(archive)
	if err != nil {
		return err
	}
	if err := write(out, binary, commands); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// tools returns the import paths of go.mod's tools.
func tools() ([]string, error) {
	out, err := exec.Command("go", "list", "tool").Output()
	if err != nil {
		return nil, fmt.Errorf("cannot list the commands: %w", err)
	}
	commands := strings.Fields(string(out))
	if len(commands) == 0 {
		return nil, fmt.Errorf("go.mod names no tools")
	}
	slices.Sort(commands)
	return commands, nil
}

func goEnv(name string) (string, error) {
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		return "", fmt.Errorf("cannot run go env %s: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// write writes the archive: bin/bb, and a link to it for each command. All names and targets
// are relative, so that it can be unpacked anywhere.
func write(w io.Writer, binary string, commands []string) error {
	content, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	records := []cpio.Record{
		cpio.Directory("bin", 0o755),
		cpio.StaticFile("bin/bb", string(content), 0o755),
	}
	for _, command := range commands {
		records = append(records, cpio.Symlink("bin/"+path.Base(command), "bb"))
	}
	packed, err := gzip.NewWriterLevel(w, gzip.BestCompression)
	if err != nil {
		return err
	}
	archive := cpio.Newc.Writer(packed)
	for i, record := range records {
		record.Ino, record.NLink, record.MTime = uint64(i+1), 1, 0
		if err := archive.WriteRecord(record); err != nil {
			return fmt.Errorf("cannot pack %s: %w", record.Name, err)
		}
	}
	if err := cpio.WriteTrailer(archive); err != nil {
		return err
	}
	return packed.Close()
}
