// Package lint checks what no test does: format, vet, staticcheck, known vulnerabilities, and that
// each module's go.mod says exactly what it needs.
package lint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// tools is the go.mod of the linters, relative to the module's root.
const tools = "ci/lint/tools/go.mod"

// A check looks at one module. It returns what it found, or errUnavailable.
type check struct {
	name string
	run  func(ctx context.Context, m module) (findings string, err error)
}

// A module is a folder with a go.mod.
type module struct {
	dir   string // absolute
	name  string // relative to the root, for people
	tools string // absolute path of the linters' go.mod
}

// errUnavailable is wrapped by a check that cannot be made on this machine.
var errUnavailable = errors.New("not possible here")

var checks = []check{
	{"gofmt", gofmt},
	{"go vet", vet},
	{"go vet -tags mage", vetMage},
	{"go mod tidy", tidy},
	{"staticcheck", staticcheck},
	{"govulncheck", govulncheck},
}

// Run makes every check on every module below root and says on out how each ended. A finding does
// not keep the other checks from being made; the error says how many failed. A check that is not
// possible on this machine is named and does not count.
func Run(ctx context.Context, root string, out io.Writer) error {
	modules, err := find(root)
	if err != nil {
		return fmt.Errorf("cannot lint: %w", err)
	}
	failed := 0
	for _, m := range modules {
		for _, c := range checks {
			begun := time.Now()
			findings, err := c.run(ctx, m)
			took := time.Since(begun).Round(100 * time.Millisecond)
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case errors.Is(err, errUnavailable):
				fmt.Fprintf(out, "SKIP %-20s %s: %v\n", c.name, m.name, err)
			case err != nil:
				failed++
				fmt.Fprintf(out, "FAIL %-20s %s: %v\n", c.name, m.name, err)
			case findings != "":
				failed++
				fmt.Fprintf(out, "FAIL %-20s %s (%s)\n%s\n", c.name, m.name, took, findings)
			default:
				fmt.Fprintf(out, "ok   %-20s %s (%s)\n", c.name, m.name, took)
			}
		}
	}
	if failed > 0 {
		return fmt.Errorf("lint: %d checks failed", failed)
	}
	return nil
}

// find returns the modules below root, the root's own first.
func find(root string) ([]module, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	var modules []module
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "out" || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if d.Name() != "go.mod" {
			return nil
		}
		name, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		modules = append(modules, module{dir: filepath.Dir(path), name: name, tools: filepath.Join(root, tools)})
		return nil
	})
	if err == nil && (len(modules) == 0 || modules[0].name != ".") {
		// WalkDir is in lexical order, so that ci/ may come before go.mod.
		for i, m := range modules {
			if m.name == "." {
				copy(modules[1:i+1], modules[:i])
				modules[0] = m
			}
		}
	}
	return modules, err
}

// files returns the module's Go files, not those of modules inside it.
func (m module) files() ([]string, error) {
	var files []string
	err := filepath.WalkDir(m.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != m.dir {
			if strings.HasPrefix(d.Name(), ".") || d.Name() == "out" || d.Name() == "testdata" {
				return filepath.SkipDir
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil {
				return filepath.SkipDir
			}
		}
		if d.Type().IsRegular() && strings.HasSuffix(d.Name(), ".go") {
			files = append(files, path)
		}
		return nil
	})
	return files, err
}

// run runs a command in the module and returns what it printed.
func (m module) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = m.dir
	cmd.Env = append(os.Environ(), "GOWORK=off")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return strings.TrimSpace(out.String()), err
}

// findings is for commands that exit with non-zero if they found something and print it.
func findings(out string, err error) (string, error) {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if out == "" {
			return err.Error(), nil
		}
		return out, nil
	}
	return "", err
}

func gofmt(ctx context.Context, m module) (string, error) {
	files, err := m.files()
	if err != nil || len(files) == 0 {
		return "", err
	}
	out, err := m.run(ctx, append([]string{"gofmt", "-l", "-s"}, files...)...)
	if err != nil {
		return findings(out, err)
	}
	return out, nil
}

func vet(ctx context.Context, m module) (string, error) {
	return packages(ctx, m, "go", "vet", "./...")
}

// vetMage looks at the magefile, which the tag hides from everything else.
func vetMage(ctx context.Context, m module) (string, error) {
	if _, err := os.Stat(filepath.Join(m.dir, "magefile.go")); err != nil {
		return "", nil
	}
	// The magefile has no main function; mage adds it.
	return findings(m.run(ctx, "go", "vet", "-tags", "mage", "magefile.go"))
}

// tidy does not change go.mod.
func tidy(ctx context.Context, m module) (string, error) {
	return findings(m.run(ctx, "go", "mod", "tidy", "-diff"))
}

func staticcheck(ctx context.Context, m module) (string, error) {
	return packages(ctx, m, "go", "tool", "-modfile="+m.tools, "staticcheck", "./...")
}

// packages runs a command on all packages of a module, if it has any.
func packages(ctx context.Context, m module, command ...string) (string, error) {
	if files, err := m.files(); err != nil || len(files) == 0 {
		return "", err
	}
	return findings(m.run(ctx, command...))
}

// vulnerable is govulncheck's exit status when it found something.
const vulnerable = 3

func govulncheck(ctx context.Context, m module) (string, error) {
	if files, err := m.files(); err != nil || len(files) == 0 {
		return "", err
	}
	out, err := m.run(ctx, "go", "tool", "-modfile="+m.tools, "govulncheck", "./...")
	return vulnerabilities(out, err)
}

// vulnerabilities tells a finding from a database that cannot be reached.
func vulnerabilities(out string, err error) (string, error) {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return "", err
	}
	// go tool passes the status on.
	if exit.ExitCode() != vulnerable && strings.Contains(out, "fetching vulnerabilities") {
		return "", fmt.Errorf("%w: the vulnerability database cannot be reached", errUnavailable)
	}
	return findings(out, err)
}
