package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/sandboxer/config"
	"kuasar.io/kuasar/sandboxer/pod"
)

func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/tmp", "vms")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestGuideDefaults(t *testing.T) {
	s, err := parse(nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	want := settings{config: "/var/lib/kuasar/config_stratovirt.toml", dir: "/run/kuasar-vmm", listen: "/run/vmm-sandboxer.sock"}
	if s != want {
		t.Errorf("settings %+v, want %+v", s, want)
	}
	if s, err := parse([]string{"--listen", "unix:///run/x.sock"}, io.Discard); err != nil || s.listen != "/run/x.sock" {
		t.Errorf("settings %+v, %v", s, err)
	}
	for _, args := range [][]string{{"--listen", "x.sock"}, {"run"}, {"--no-such"}} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}

// The configuration's word goes to the manager as it is.
func TestTaskAddressForms(t *testing.T) {
	for configured, form := range map[string]string{
		config.TaskAddressAuto: pod.AddressAuto, config.TaskAddressVsock: pod.AddressVsock,
		config.TaskAddressTTRPCVsock: pod.AddressTTRPCVsock, config.TaskAddressUnix: pod.AddressUnix,
	} {
		if configured != form {
			t.Errorf("the configuration says %q for what the manager calls %q", configured, form)
		}
	}
}

func TestShareType(t *testing.T) {
	for params, want := range map[string]string{
		"":                         "",
		"quiet task.debug":         "",
		"task.sharefs_type=9p":     "9p",
		"task.sharefs_type=9p x=y": "9p",
		"task.sharefs_type=virtiofs task.sharefs_type=9p": "9p",
		"task.sharefs_type=9p task.sharefs_type=virtiofs": "virtiofs",
	} {
		if got, err := shareType(params); got != want || err != nil {
			t.Errorf("%q: %q, %v; want %q", params, got, err, want)
		}
	}
	for _, params := range []string{"task.sharefs_type=", "task.sharefs_type=nfs"} {
		if got, err := shareType(params); err == nil {
			t.Errorf("%q is taken for %q", params, got)
		}
	}
}

func TestRefusesToStart(t *testing.T) {
	dir := shortDir(t)
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	kernel := write("kernel", "k", 0o644)
	initrd := write("initrd", "i", 0o644)
	strato := write("stratovirt", "#!/bin/sh\necho StratoVirt 2.4.0\n", 0o755)
	other := write("other", "#!/bin/sh\necho something else\n", 0o755)
	file := func(lines ...string) string {
		return write("config.toml", "[hypervisor]\n"+strings.Join(lines, "\n")+"\n", 0o644)
	}
	set := func(key, value string) string { return key + ` = "` + value + `"` }
	good := []string{set("kernel_path", kernel), set("initrd_path", initrd)}
	for name, c := range map[string]struct {
		config string
		lines  []string
		args   []string
		want   []string
	}{
		"no file":     {config: "/nonexistent.toml", want: []string{"/nonexistent.toml", "--config"}},
		"unknown key": {lines: []string{set("kernel_pth", kernel)}, want: []string{"kernel_pth", "kernel_path"}},
		"wrong type":  {lines: []string{set("vcpus", "two")}, want: []string{"vcpus"}},
		"no hypervisor": {lines: append(good, set("path", "/nonexistent/qemu-system-x86_64")),
			want: []string{"hypervisor.path", "/nonexistent/qemu-system-x86_64", "install"}},
		"no kernel": {lines: []string{set("path", other), set("kernel_path", "/nonexistent/k"), set("initrd_path", initrd)},
			want: []string{"hypervisor.kernel_path", "/nonexistent/k", "kuasar"}},
		"no initrd": {lines: []string{set("path", other), set("kernel_path", kernel), set("initrd_path", "/nonexistent/i")},
			want: []string{"hypervisor.initrd_path", "/nonexistent/i"}},
		"stratovirt": {lines: append(good, set("path", strato)), want: []string{"hypervisor.path", "StratoVirt 2.4.0", "edk2-ovmf"}},
		"stratovirt without KVM": {lines: append(good, set("path", strato), set("machine_type", "microvm"), set("accelerator", "tcg")),
			want: []string{"hypervisor.path", "StratoVirt 2.4.0", "needs KVM", "config_qemu.toml"}},
		"no hypervisor at all": {lines: append(good, set("path", other)), want: []string{"hypervisor.path", "something else", "StratoVirt or QEMU is expected"}},
		"log level":            {lines: append(good, set("path", other)), args: []string{"--log-level", "loud"}, want: []string{"--log-level", "loud", "debug"}},
		"long dir": {lines: append(good, set("path", other)), args: []string{"--dir", filepath.Join(dir, strings.Repeat("d", 60))},
			want: []string{"--dir", "too long"}},
		"relative dir": {lines: append(good, set("path", other)), args: []string{"--dir", "x"}, want: []string{"--dir", "absolute"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := c.config
			if path == "" {
				path = file(c.lines...)
			}
			args := append([]string{"--config", path, "--dir", filepath.Join(dir, "d"), "--listen", filepath.Join(dir, "s")}, c.args...)
			err := run(context.Background(), args, io.Discard, io.Discard)
			if err == nil {
				t.Fatal("it started")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the error has no %q: %v", w, err)
				}
			}
			if _, err := os.Lstat(filepath.Join(dir, "s")); err == nil {
				t.Error("there is a socket")
			}
		})
	}
}

func TestVersion(t *testing.T) {
	var out bytes.Buffer
	if err := run(context.Background(), []string{"--version"}, &out, io.Discard); err != nil || !strings.HasPrefix(out.String(), "vmm-sandboxer ") {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func TestOneDaemonPerDirectory(t *testing.T) {
	dir := shortDir(t)
	first, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockDir(dir); err == nil || !strings.Contains(err.Error(), "another vmm-sandboxer") {
		t.Errorf("second lock: %v", err)
	}
	first.Close()
	second, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
}

func TestSocket(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "s")
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := listen(path); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a live socket is taken: %v", err)
	}
	// Stale now: the file is there, and nobody listens.
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Fatal(err)
	}
	l, err = listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if c, err := net.Dial("unix", path); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(precious); err == nil {
		t.Error("a file was replaced")
	}
	if b, _ := os.ReadFile(precious); string(b) != "x" {
		t.Error("a file was touched")
	}
	if err := checkSocket("/" + strings.Repeat("x", 120)); err == nil {
		t.Error("a path too long for the kernel is accepted")
	}
}

func TestShim(t *testing.T) {
	for name, want := range map[string]bool{"/usr/bin/containerd-shim-vmm-v1": true, "containerd-shim-kuasar-v2": true, "/usr/bin/vmm-sandboxer": false} {
		if isShim(name) != want {
			t.Errorf("isShim(%s) is %v", name, !want)
		}
	}
	var out, errs bytes.Buffer
	if code := shim([]string{"-info"}, &out, &errs); code != 0 {
		t.Errorf("-info: %d, %s", code, errs.String())
	}
	var info types.RuntimeInfo
	if err := proto.Unmarshal(out.Bytes(), &info); err != nil || info.Name == "" || info.Version.GetVersion() == "" {
		t.Errorf("info %v, %v", &info, err)
	}
	out.Reset()
	if code := shim([]string{"-namespace", "k8s.io", "-id", "c1", "-bundle", "/x", "delete"}, &out, &errs); code != 0 {
		t.Errorf("delete: %d, %s", code, errs.String())
	}
	var deleted taskv3.DeleteResponse
	if err := proto.Unmarshal(out.Bytes(), &deleted); err != nil {
		t.Error(err)
	}
	out.Reset()
	if code := shim([]string{"-namespace", "k8s.io", "-id", "c1", "start"}, &out, &errs); code == 0 || out.Len() > 0 || !strings.Contains(errs.String(), "sandboxer") {
		t.Errorf("start: %d, %q, %q", code, out.String(), errs.String())
	}
	if code := shim(nil, &out, &errs); code == 0 {
		t.Error("no action is accepted")
	}
}

func TestLogLevels(t *testing.T) {
	for name, want := range map[string]slog.Level{"trace": levelTrace, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError} {
		if got, err := logLevel("", name); err != nil || got != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if got, err := logLevel("debug", "error"); err != nil || got != slog.LevelDebug {
		t.Errorf("the option does not win: %v, %v", got, err)
	}
}
