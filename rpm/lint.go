package rpm

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed rpmlint.toml
var rpmlintConfig []byte

// Lint runs rpmlint on packages and returns what it found, "" if that is nothing. Packages may be signed.
//
// rpmlint unpacks with cpio what it looks at, and these packages have absolute names, so that by root's
// rpmlint they would be unpacked over the running system. Here a cpio is put before the true one that
// makes all names relative.
func Lint(ctx context.Context, packages ...string) (findings string, err error) {
	findings, err = lint(ctx, packages)
	if err != nil {
		return "", fmt.Errorf("cannot check %s with rpmlint: %w", strings.Join(packages, " "), err)
	}
	return findings, nil
}

func lint(ctx context.Context, packages []string) (string, error) {
	program, err := exec.LookPath("rpmlint")
	if err != nil {
		return "", err
	}
	cpio, err := exec.LookPath("cpio")
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "rpmlint-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	config := filepath.Join(dir, "kuasar.toml")
	if err := os.WriteFile(config, rpmlintConfig, 0o600); err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		return "", err
	}
	guard := fmt.Sprintf("#!/bin/sh\nexec '%s' --no-absolute-filenames \"$@\"\n", cpio)
	if err := os.WriteFile(filepath.Join(bin, "cpio"), []byte(guard), 0o700); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, program, append([]string{"-c", config}, packages...)...)
	// Should anything be unpacked to relative names after all, it goes with the folder.
	cmd.Dir = dir
	for i, p := range packages {
		if cmd.Args[3+i], err = filepath.Abs(p); err != nil {
			return "", err
		}
	}
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "TMPDIR="+dir, "LC_ALL=C.UTF-8")
	out, err := cmd.CombinedOutput()
	text := string(out)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", err
	}
	if !strings.Contains(text, "packages and ") {
		return "", fmt.Errorf("it did not end as it should: %w\n%s", errors.Join(err, ctx.Err()), text)
	}
	return found(text), nil
}

// found returns the lines of rpmlint's output that are findings: "kuasar.x86_64: W: what where".
func found(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		for _, kind := range []string{": E: ", ": W: "} {
			if strings.Contains(line, kind) {
				lines = append(lines, line)
			}
		}
	}
	return strings.Join(lines, "\n")
}
