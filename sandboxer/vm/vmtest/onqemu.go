package vmtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/sandboxer/vm/qmp"
)

// defaultRelease is that of a program whose name has none.
const defaultRelease = "2.3.0"

// answerTimeout bounds QEMU's answers.
const answerTimeout = 20 * time.Second

// qemuProgram is the QEMU of a machine type, on this architecture.
var qemuProgram = map[string]string{"q35": "qemu-system-x86_64", "microvm": "qemu-system-x86_64", "virt": "qemu-system-aarch64"}

// StratoVirtOnQEMU is the main function of a program that takes the command line and the monitor's requests
// of StratoVirt and has QEMU do what they ask for, on its emulation. args[0] ends with the version,
// as in stratovirt-2.4.0. The status is the program's exit status; the error is one of the command line,
// and others are where that has the log. A firmware is checked and then left to QEMU, which starts a kernel
// with its own.
func StratoVirtOnQEMU(args []string) (status int, err error) {
	release := defaultRelease
	if _, version, found := strings.Cut(filepath.Base(args[0]), "-"); found {
		release = version
	}
	args = args[1:]
	if len(args) == 1 && (args[0] == "-version" || args[0] == "-V") {
		fmt.Printf("StratoVirt %s on QEMU (tcg)\n", release)
		return 0, nil
	}
	r, err := ParseRelease(release)
	if err != nil {
		return 1, err
	}
	line, err := ParseStratoVirt(r, args)
	if err != nil {
		return 1, err
	}
	// QEMU dies with the thread that starts it, which must therefore live as long as this process.
	runtime.LockOSThread()
	b := &onQEMU{line: line, release: release}
	status, err = b.run(args)
	if err != nil {
		line.fail(err)
		status = max(status, 1)
	}
	return status, nil
}

// onQEMU is a running StratoVirt whose work QEMU does.
type onQEMU struct {
	line    *StratoVirtLine
	release string
	server  *Server
	qemu    *qmp.Client

	mu sync.Mutex
}

func (b *onQEMU) run(args []string) (status int, err error) {
	// The monitor listens before anything else is there. 2.2 does not replace what is in its place.
	monitor, err := (&strato{line: b.line}).bind(b.line.QMP, !b.line.Release.before(3))
	if err != nil {
		return 1, err
	}
	defer os.Remove(b.line.QMP)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 1, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "monitor"), os.NewFile(uintptr(pair[1]), "monitor")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return 1, err
	}
	// Those that it was given keep their numbers, as the arguments name them.
	var files []*os.File
	for fd := 3; fd < 3+len(b.line.fds); fd++ {
		if _, ok := b.line.fds[fd]; !ok {
			return 1, fmt.Errorf("descriptor %d is not used", fd)
		}
		files = append(files, os.NewFile(uintptr(fd), "inherited"))
	}
	files = append(files, theirs)
	translated, err := b.translate(args, 2+len(files))
	if err != nil {
		return 1, err
	}
	cmd := exec.Command(qemuProgram[b.line.Machine], translated...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = b.line.log(), b.line.log(), files
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	defer os.Remove(b.line.Console)
	if b.line.Agent != "" {
		defer os.Remove(b.line.Agent)
	}
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	for _, f := range files {
		f.Close()
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	go func() {
		<-signals
		cmd.Process.Signal(syscall.SIGTERM)
	}()
	go b.serve(monitor, conn.(*net.UnixConn))
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil
	}
	return 0, err
}

// serve answers StratoVirt's monitor once QEMU's is there.
func (b *onQEMU) serve(monitor *net.UnixListener, conn *net.UnixConn) {
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
	defer cancel()
	client, err := qmp.New(ctx, conn, b.onEvent)
	if err != nil {
		b.line.fail(err)
		return
	}
	server := &Server{StratoVirt: b.release, Commands: map[string]Handler{
		"query-status": func(args json.RawMessage, file *os.File) (any, error) {
			var status struct {
				Status  string `json:"status"`
				Running bool   `json:"running"`
			}
			err := b.ask("query-status", nil, &status)
			return map[string]any{"status": status.Status, "running": status.Running, "singlestep": false}, err
		},
		"quit":         b.forward("quit"),
		"blockdev-add": b.addNode,
		"blockdev-del": b.forward("blockdev-del", "node-name"),
		"device_add":   b.forward("device_add", "id", "driver", "addr", "bus", "drive", "serial"),
		"device_del":   b.forward("device_del", "id"),
	}}
	b.mu.Lock()
	b.qemu, b.server = client, server
	b.mu.Unlock()
	server.Serve(monitor)
}

// onEvent tells the client what StratoVirt tells.
func (b *onQEMU) onEvent(e qmp.Event) {
	b.mu.Lock()
	server := b.server
	b.mu.Unlock()
	if server == nil {
		return // nobody listens yet
	}
	switch e.Name {
	case "DEVICE_DELETED":
		var data struct {
			Device string `json:"device"`
		}
		if json.Unmarshal(e.Data, &data) == nil && data.Device != "" { // StratoVirt has no events for parts
			server.Emit(e.Name, map[string]string{"device": data.Device, "path": "/machine/peripheral/" + data.Device})
		}
	case "RESET", "SHUTDOWN":
		var data struct {
			Guest bool `json:"guest"`
		}
		json.Unmarshal(e.Data, &data)
		server.Emit(e.Name, map[string]bool{"guest": data.Guest})
	}
}

func (b *onQEMU) ask(command string, args, result any) error {
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
	defer cancel()
	err := b.qemu.Execute(ctx, command, args, result)
	var refused *qmp.Error
	if !errors.As(err, &refused) {
		return err
	}
	desc := refused.Desc
	if strings.Contains(desc, "unplug") {
		desc = "Guest is still on the fly of another (un)plugging"
	}
	return &Refusal{refused.Class, desc}
}

// forward gives QEMU a command whose arguments are strings with these names.
func (b *onQEMU) forward(command string, names ...string) Handler {
	return func(raw json.RawMessage, file *os.File) (any, error) {
		if file != nil {
			file.Close()
			return nil, errors.New("a descriptor with a command that takes none")
		}
		if len(raw) == 0 {
			raw = []byte("{}")
		}
		var args map[string]string
		if err := DecodeStrictly(raw, &args); err != nil {
			return nil, &unparsed{err}
		}
		for name := range args {
			if !slices.Contains(names, name) {
				return nil, &unparsed{fmt.Errorf("unknown field `%s`", name)}
			}
		}
		if command == "device_add" && (args["driver"] != "virtio-blk-pci" || !b.line.RootPorts[args["bus"]] || args["addr"] != "0x0") {
			return nil, errors.New("hot plug is for slot 0 of a root port")
		}
		return nil, b.ask(command, args, nil)
	}
}

func (b *onQEMU) addNode(raw json.RawMessage, file *os.File) (any, error) {
	if file != nil {
		file.Close()
		return nil, errors.New("a descriptor with a command that takes none")
	}
	a, err := ParseBlockdevAdd(b.line.Release, raw)
	if err != nil {
		return nil, err
	}
	source := map[string]any{"driver": "file", "filename": a.File.Filename, "cache": map[string]bool{"direct": a.Cache == nil || a.Cache.Direct == nil || *a.Cache.Direct}}
	if fi, err := os.Stat(a.File.Filename); err == nil && fi.Mode()&os.ModeDevice != 0 {
		source["driver"] = "host_device"
	}
	if a.File.AIO != nil && *a.File.AIO == "native" {
		source["aio"] = "native"
	}
	return nil, b.ask("blockdev-add", map[string]any{"driver": "raw", "node-name": a.NodeName, "read-only": a.ReadOnly, "file": source}, nil)
}

var sizeRE = regexp.MustCompile(`^\d+$`)

// translate returns QEMU's arguments; its monitor is on the inherited descriptor fd.
func (b *onQEMU) translate(args []string, fd int) ([]string, error) {
	l := b.line
	if qemuProgram[l.Machine] == "" {
		return nil, fmt.Errorf("nothing can be booted on the machine %q", l.Machine)
	}
	memory := l.Options["m"]
	if sizeRE.MatchString(memory) {
		memory += "M"
	}
	backend := "memory-backend-memfd,id=ram,size=" + memory
	if l.share {
		backend += ",share=on"
	}
	if l.Options["mem-prealloc"] != "" {
		backend += ",prealloc=on"
	}
	machine := map[string]string{"virt": "virt,gic-version=max", "microvm": "microvm,isa-serial=on"}[l.Machine]
	if machine == "" {
		machine = l.Machine
	}
	cpu := "max"
	if l.Machine == "virt" {
		cpu += ",pauth-impdef=on"
	}
	q := []string{
		"-name", l.Options["name"], "-object", backend, "-machine", machine + ",memory-backend=ram",
		"-accel", "tcg,thread=multi,tb-size=64", "-cpu", cpu, "-smp", strings.TrimPrefix(l.Options["smp"], "cpus="), "-m", memory,
		"-nodefaults", "-no-user-config", "-display", "none",
		"-kernel", l.Options["kernel"], "-append", l.Options["append"] + quicker(l),
		"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d", fd), "-mon", "chardev=monitor,mode=control",
		"-chardev", "socket,id=serial,path=" + comma(l.Console) + ",server=on,wait=off", "-serial", "chardev:serial",
	}
	if l.Machine == "q35" {
		if dirs, err := exec.Command(qemuProgram[l.Machine], "-L", "help").Output(); err == nil {
			for dir := range strings.Lines(string(dirs)) {
				if rom := filepath.Join(strings.TrimSpace(dir), "qboot.rom"); exists(rom) {
					q = append(q, "-bios", rom)
					break
				}
			}
		}
		// As StratoVirt's, its root ports tell the guest by themselves what comes and goes.
		q = append(q, "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
	}
	if initrd := l.Options["initrd"]; initrd != "" {
		q = append(q, "-initrd", initrd)
	}
	ports := 0
	for i := 0; i+1 < len(args); i++ {
		name := strings.TrimPrefix(args[i], "-")
		if !slices.Contains(stratoMulti, name) || name == args[i] {
			continue
		}
		i++
		kv, err := l.split(args[i])
		if err != nil {
			return nil, err
		}
		switch {
		case name == "drive" && kv["if"] == "pflash":
			continue
		case name == "drive":
			kv["if"], kv["format"], kv["cache.direct"] = "none", "raw", "on"
			if kv["direct"] == "off" {
				kv["cache.direct"] = "off"
			}
			delete(kv, "direct")
		case name == "chardev":
			if _, listens := kv["server"]; listens {
				kv["server"], kv["wait"] = "on", "off"
			}
			delete(kv, "nowait")
		case name == "netdev":
			kv["vhost"] = "off"
		case kv["type"] == "pcie-root-port":
			ports++
			kv["chassis"], kv["slot"] = fmt.Sprint(ports), fmt.Sprint(ports)
		case strings.HasPrefix(kv["type"], "virtio-net-pci"):
			kv["romfile"] = ""
		}
		q = append(q, "-"+name, joined(kv))
	}
	return q, nil
}

// quicker are parameters of the guest's kernel that shorten its boot on an emulation by a third.
func quicker(l *StratoVirtLine) string {
	if l.Machine == "virt" {
		return ""
	}
	if l.Options["smp"] != "cpus=1" {
		return " no_timer_check"
	}
	return " no_timer_check noapictimer"
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// joined is the reverse of split, as QEMU has it.
func joined(kv map[string]string) string {
	var s bytes.Buffer
	s.WriteString(comma(kv["type"]))
	keys := make([]string, 0, len(kv))
	for key := range kv {
		if key != "type" {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		if s.Len() > 0 {
			s.WriteByte(',')
		}
		s.WriteString(key + "=" + comma(kv[key]))
	}
	return s.String()
}

func comma(value string) string { return strings.ReplaceAll(value, ",", ",,") }
