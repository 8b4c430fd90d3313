// Package kernel builds the guest kernel: one image without modules, from a distribution's kernel
// source and the fragments in this folder.
//
// The same source, fragments and compiler yield the same bytes, wherever and whenever they are
// built; and because that takes minutes, the result is kept by the content of those inputs.
package kernel

import (
	"bufio"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"kuasar.io/kuasar/ci/cache"
)

//go:embed *.config
var fragments embed.FS

// format of the cached entry: raised when the builder does something else with the same inputs.
const entryFormat = 1

// A target is what differs between architectures.
type target struct {
	fragment string // file of its own fragment
	arch     string // make's ARCH
	goal     string // make's goal
	image    string // where make leaves the image
	cross    string // prefix of the cross tools, used on a host of another architecture
}

// targets by GOARCH.
var targets = map[string]target{
	"amd64": {"x86_64.config", "x86_64", "bzImage", "arch/x86/boot/bzImage", "x86_64-linux-gnu-"},
	"arm64": {"aarch64.config", "arm64", "Image", "arch/arm64/boot/Image", "aarch64-linux-gnu-"},
}

// Config says what to build.
type Config struct {
	// Source is a tree or a tarball; empty means the distribution's source package.
	Source string
	// Arch is the guest's architecture as Go names it; empty means the host's.
	Arch string
	// Output is where the image is put, e.g. out/vmlinux.bin. Empty leaves it in the cache only.
	Output string
	// Progress receives a line now and then; nil means none.
	Progress io.Writer
}

// Build makes the kernel, or finds it in the cache, and returns the path of the image: Output, or
// the one in the cache, which must not be changed. An error names the stage, and after a failed
// compilation the file with the whole log.
func Build(ctx context.Context, cfg Config) (string, error) {
	b, err := newBuild(cfg)
	if err != nil {
		return "", fmt.Errorf("cannot build the guest kernel: %w", err)
	}
	key, err := b.key(ctx)
	if err != nil {
		return "", fmt.Errorf("cannot build the guest kernel: %w", err)
	}
	dir, err := cache.Entry(ctx, "kernel", key, func(dir, scratch string) error { return b.fill(ctx, dir, scratch) })
	if err != nil {
		return "", fmt.Errorf("cannot build the guest kernel: %w", err)
	}
	image := filepath.Join(dir, imageName)
	if cfg.Output == "" {
		return image, nil
	}
	if err := cache.Publish(image, cfg.Output, 0o644); err != nil {
		return "", fmt.Errorf("cannot build the guest kernel: %w", err)
	}
	return cfg.Output, nil
}

const imageName = "vmlinux.bin"

type build struct {
	target
	source   source
	cross    string
	progress io.Writer
	begun    time.Time
}

func newBuild(cfg Config) (*build, error) {
	arch := cfg.Arch
	if arch == "" {
		arch = runtime.GOARCH
	}
	t, ok := targets[arch]
	if !ok {
		return nil, fmt.Errorf("architecture %q is not one of amd64, arm64", arch)
	}
	src, err := findSource(cfg.Source, "/usr/src")
	if err != nil {
		return nil, err
	}
	b := &build{target: t, source: src, progress: cfg.Progress, begun: time.Now()}
	if arch != runtime.GOARCH {
		b.cross = t.cross
	}
	if b.progress == nil {
		b.progress = io.Discard
	}
	return b, nil
}

func (b *build) say(format string, args ...any) {
	fmt.Fprintf(b.progress, "kernel %6s  %s\n", time.Since(b.begun).Round(time.Second), fmt.Sprintf(format, args...))
}

// files are the fragments of this build.
func (b *build) files() []string {
	return []string{"base.config", "netfilter.config", b.fragment}
}

// key is the name under which the result is kept.
func (b *build) key(ctx context.Context) (string, error) {
	k := cache.NewKey(entryFormat).Add("arch", b.arch)
	for _, name := range b.files() {
		data, err := fragments.ReadFile(name)
		if err != nil {
			return "", err
		}
		symbols, err := parse(name, data)
		if err != nil {
			return "", err
		}
		// The symbols and not the file: a better comment is no other kernel.
		for _, s := range symbols {
			k.Add(s.String(), fmt.Sprint(s.since, s.ifKnown))
		}
	}
	for _, tool := range []string{"gcc", "ld"} {
		cmd := exec.CommandContext(ctx, b.cross+tool, "--version")
		cmd.Env = environment()
		out, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("cannot ask %s for its version: %w", b.cross+tool, err)
		}
		// "gcc (Debian 12.2.0-14) 12.2.0": without the name by which it was called.
		first, _, _ := strings.Cut(string(out), "\n")
		_, version, _ := strings.Cut(first, " ")
		k.Add(tool, version)
	}
	b.source.identify(k)
	return k.Sum()
}

// fill makes the cache entry dir: the image, and the configuration that it was built with.
func (b *build) fill(ctx context.Context, dir, scratch string) error {
	b.say("unpacking %s", b.source.path)
	top, err := b.source.unpack(ctx, scratch)
	if err != nil {
		return err
	}
	version, err := sourceVersion(top)
	if err != nil {
		return err
	}
	b.say("configuring Linux %s for %s", version, b.arch)
	if err := b.configure(ctx, top, version); err != nil {
		return err
	}
	if err := b.compile(ctx, top); err != nil {
		return err
	}
	for from, to := range map[string]string{b.image: imageName, ".config": "config"} {
		if err := cache.Publish(filepath.Join(top, from), filepath.Join(dir, to), 0o644); err != nil {
			return err
		}
	}
	b.say("done")
	return nil
}

// configure writes top's .config and refuses one that lost a symbol.
func (b *build) configure(ctx context.Context, top, version string) error {
	var parts [][]symbol
	for _, name := range b.files() {
		data, err := fragments.ReadFile(name)
		if err != nil {
			return err
		}
		part, err := parse(name, data)
		if err != nil {
			return err
		}
		parts = append(parts, part)
	}
	known, err := defined(top)
	if err != nil {
		return err
	}
	requested, err := merge(version, known, parts...)
	if err != nil {
		return err
	}
	wanted := filepath.Join(top, ".wanted")
	if err := os.WriteFile(wanted, format(requested), 0o644); err != nil {
		return err
	}
	// Kconfig starts from "everything off" and then takes our values where dependencies allow.
	args := append(b.variables(), "-s", "KCONFIG_ALLCONFIG="+wanted, "allnoconfig")
	if err := run(ctx, top, "make", args...); err != nil {
		return fmt.Errorf("cannot configure: %w", err)
	}
	config, err := os.ReadFile(filepath.Join(top, ".config"))
	if err != nil {
		return err
	}
	missing, err := lost(requested, config)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("the source, Linux %s, does not honour %d of the requested symbols (a dependency is missing, or the symbol is gone):\n  %s",
			version, len(missing), strings.Join(missing, "\n  "))
	}
	return nil
}

// compile runs make and tells how far it is.
func (b *build) compile(ctx context.Context, top string) error {
	logPath, err := logFile(b.arch)
	if err != nil {
		return err
	}
	log, err := os.Create(logPath)
	if err != nil {
		return err
	}
	defer log.Close()
	jobs := runtime.NumCPU()
	b.say("compiling with %d jobs, log in %s", jobs, logPath)
	// The kernel is the longest build of all; the machine should stay usable meanwhile.
	args := append([]string{"-n", "5", "make", fmt.Sprintf("-j%d", jobs)}, b.variables()...)
	cmd := exec.CommandContext(ctx, "nice", append(args, b.goal)...)
	cmd.Dir, cmd.Env = top, environment()
	// make's children must end with it, or they go on writing into a directory that is removed; and
	// make with us, even if we are killed. The kernel ties the latter to the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot compile: %w", err)
	}
	tail := b.follow(io.TeeReader(out, log))
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("cannot compile: %w", context.Cause(ctx))
		}
		return fmt.Errorf("cannot compile: %w; the log %s ends with:\n  %s", err, logPath, strings.Join(tail, "\n  "))
	}
	return nil
}

// follow reads make's output to its end, printing a line every 20 seconds, and returns its last
// lines.
func (b *build) follow(out io.Reader) (tail []string) {
	const most = 25
	compiled, last := 0, time.Now()
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadString('\n')
		if line = strings.TrimRight(line, "\n"); line != "" {
			if tail = append(tail, line); len(tail) > most {
				tail = tail[1:]
			}
			if f := strings.Fields(line); len(f) > 1 && (f[0] == "CC" || f[0] == "AS") {
				compiled++
			}
			if time.Since(last) >= 20*time.Second {
				b.say("%d files compiled", compiled)
				last = time.Now()
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				tail = append(tail, err.Error())
			}
			return tail
		}
	}
}

// variables are what make is told on its command line. Date, host, user and build number would
// otherwise be in the image.
func (b *build) variables() []string {
	return []string{
		"ARCH=" + b.arch,
		"CROSS_COMPILE=" + b.cross,
		"KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970",
		"KBUILD_BUILD_USER=kuasar",
		"KBUILD_BUILD_HOST=kuasar.io",
		"KBUILD_BUILD_VERSION=1",
	}
}

// environment is what the build sees of the caller's environment: nothing that would change the
// result (ARCH, KCFLAGS, MAKEFLAGS, the language).
func environment() []string {
	env := []string{"LC_ALL=C", "TZ=UTC"}
	for _, name := range []string{"PATH", "HOME", "TMPDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// logFile is where the output of the last compilation is kept, also after a failure.
func logFile(arch string) (string, error) {
	dir, err := cache.Dir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "kernel-"+arch+".log"), nil
}
