package vmtest

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const stratoVirtProgram = "stratovirt"

// StratoVirtStandIn makes a StratoVirt of a version, such as 2.3.0, that behaves as told and returns its
// path. It understands the options that the driver may use by the grammar of that version, binds its
// sockets as that version does, and refuses everything else. The test's TestMain must call RunStandIn
// first.
func StratoVirtStandIn(t testing.TB, version string, b Behaviour) string {
	t.Helper()
	if b.Version == "" {
		b.Version = "StratoVirt " + version
	}
	b.Release = version
	return standInNamed(t, stratoVirtProgram, b)
}

// Release is a version of StratoVirt, without the last number.
type Release struct{ Major, Minor int }

func (r Release) before(minor int) bool { return r.Major < 2 || r.Major == 2 && r.Minor < minor }

// ParseRelease understands 2.3.0 and "StratoVirt 2.3.0".
func ParseRelease(version string) (r Release, err error) {
	_, err = fmt.Sscanf(strings.TrimPrefix(version, "StratoVirt "), "%d.%d", &r.Major, &r.Minor)
	return r, err
}

// StratoVirtLine is what StratoVirt was told on its command line.
type StratoVirtLine struct {
	Release Release
	// Machine is virt, q35 or microvm.
	Machine string
	// QMP and Console are the paths of the sockets that it binds.
	QMP, Console string
	// Agent is the path of the socket of the virtio-serial port, which it binds as well, or "".
	Agent string
	// Share is the socket of a virtiofs daemon that it connects to, or "".
	Share string
	// RootPorts are the ids of the slots for hot-plugged devices.
	RootPorts map[string]bool
	// Devices are the others: each with its driver under "type".
	Devices []map[string]string
	// Options are the values of those that occur once, without their dash.
	Options map[string]string

	fds      map[int]string
	ids      map[string]bool // of devices
	slots    map[int]bool
	pflash   map[string]bool
	defined  map[string]map[string]string // "chardev:x", "netdev:x", "drive:x", "object:x"
	consumed map[string]bool
	share    bool // the machine's memory
	serial   bool // there is a virtio-serial device
	blocks   int  // virtio-blk devices
	nets     int  // virtio-net devices
}

var (
	// -D could name a file, which StratoVirt would rotate as it sees fit: no way for the driver.
	stratoFlags = []string{"mem-prealloc", "D"}
	stratoOnce  = []string{"name", "machine", "qmp", "kernel", "initrd", "append", "smp", "m", "serial", "global"}
	stratoMulti = []string{"drive", "object", "netdev", "chardev", "device"}
	// What exists and would be understood, but is no way for the driver to run a pod.
	stratoUnwanted = []string{"daemonize", "pidfile", "disable-seccomp", "freeze", "S", "incoming", "mod-test", "no-shutdown", "mon"}
)

// stratoDevices are the virtio devices, without their suffix, and their properties beside bus and addr.
var stratoDevices = map[string][]string{
	"virtio-rng":    {"id", "rng", "max-bytes", "period"},
	"virtio-blk":    {"id", "drive", "serial", "iothread", "num-queues", "bootindex", "queue-size"},
	"virtio-net":    {"id", "netdev", "mac", "mq", "queue-size", "vectors", "iothread"},
	"vhost-vsock":   {"id", "guest-cid", "vhostfd"},
	"vhost-user-fs": {"id", "chardev", "tag"},
	"virtio-serial": {"id", "max_ports"},
}

// ParseStratoVirt understands a command line as the release does. It makes nothing and connects
// nowhere.
func ParseStratoVirt(r Release, args []string) (*StratoVirtLine, error) {
	l := &StratoVirtLine{
		Release: r, RootPorts: map[string]bool{}, Options: map[string]string{},
		fds: map[int]string{}, ids: map[string]bool{}, slots: map[int]bool{0: true}, pflash: map[string]bool{},
		defined: map[string]map[string]string{}, consumed: map[string]bool{},
	}
	multi := map[string][]string{}
	for i := 0; i < len(args); i++ {
		name, ok := strings.CutPrefix(args[i], "-")
		if !ok || name == "" {
			return nil, fmt.Errorf("unexpected argument %q", args[i])
		}
		// Whatever begins with a hyphen is an option, and no value.
		value, has := "", i+1 < len(args) && !strings.HasPrefix(args[i+1], "-")
		if has {
			i++
			value = args[i]
		}
		switch {
		case slices.Contains(stratoMulti, name):
			if !has {
				return nil, fmt.Errorf("-%s needs a value", name)
			}
			multi[name] = append(multi[name], value)
			continue
		case slices.Contains(stratoFlags, name):
			if has {
				return nil, fmt.Errorf("unexpected argument %q", value)
			}
			value = "on"
		case slices.Contains(stratoOnce, name):
			if !has {
				return nil, fmt.Errorf("-%s needs a value", name)
			}
		case slices.Contains(stratoUnwanted, name):
			return nil, fmt.Errorf("-%s: not a way to run a pod", name)
		default:
			return nil, fmt.Errorf("-%s: unrecognized option", name)
		}
		if _, twice := l.Options[name]; twice {
			return nil, fmt.Errorf("-%s: given twice", name)
		}
		l.Options[name] = value
	}
	// The order is StratoVirt's own, whatever that of the arguments.
	for _, name := range []string{"machine", "m", "smp", "kernel", "initrd", "append", "serial", "qmp", "name", "global"} {
		if err := l.option(name); err != nil {
			return nil, fmt.Errorf("-%s %s: %w", name, l.Options[name], err)
		}
	}
	for _, name := range stratoMulti {
		for _, value := range multi[name] {
			kv, err := l.split(value)
			if err == nil {
				err = l.add(name, kv)
			}
			if err != nil {
				return nil, fmt.Errorf("-%s %s: %w", name, value, err)
			}
		}
	}
	if l.Machine == "q35" && !l.pflash["0"] {
		return nil, errors.New("q35 does not boot without a firmware in pflash 0")
	}
	if l.Machine == "microvm" && len(l.Devices) > 11 {
		return nil, errors.New("no interrupt is left for a device")
	}
	return l, nil
}

// split takes "type,key=value,flag" apart by the rules of the release. What comes first without a key
// is the type.
func (l *StratoVirtLine) split(value string) (map[string]string, error) {
	kv := make(map[string]string)
	for i, item := range strings.Split(value, ",") {
		if item == "" {
			return nil, errors.New("an empty item")
		}
		if !l.Release.before(5) && strings.Count(item, "=") > 1 {
			return nil, fmt.Errorf("%q has more than one equals sign", item)
		}
		key, v, ok := strings.Cut(item, "=")
		if ok && (key == "" || v == "") {
			return nil, fmt.Errorf("%q lacks its key or its value", item)
		}
		if i == 0 && !ok {
			key, v = "type", item
		}
		if _, twice := kv[key]; twice {
			return nil, fmt.Errorf("%q is given twice", key)
		}
		if len(v) > 255 {
			return nil, fmt.Errorf("the value of %q is too long", key)
		}
		kv[key] = v
	}
	return kv, nil
}

var memoryRE = regexp.MustCompile(`^(\d+)(M|G)?$`)

func (l *StratoVirtLine) option(name string) error {
	value, given := l.Options[name]
	switch name {
	case "machine":
		kv, err := l.split(value)
		if err != nil {
			return err
		}
		l.Machine, l.share = kv["type"], kv["mem-share"] == "on"
		if l.Machine == "none" {
			return only(kv)
		}
		if l.Machine == "q35" {
			l.slots[0x1f] = true // the LPC bridge
		}
		if !slices.Contains([]string{"virt", "q35", "microvm"}, l.Machine) {
			return errors.New("unsupported machine type")
		}
		return only(kv, "accel", "usb", "dump-guest-core", "mem-share", "gic-version")
	case "m":
		if l.Machine == "none" {
			return nil
		}
		m := memoryRE.FindStringSubmatch(value)
		if m == nil {
			return errors.New("not a size")
		}
		size, _ := strconv.Atoi(m[1])
		if m[2] == "G" {
			size <<= 10
		}
		if size < 128 || size > 512<<10 {
			return errors.New("must be 128 MiB to 512 GiB")
		}
	case "smp":
		if l.Machine == "none" {
			return nil
		}
		n, err := strconv.Atoi(strings.TrimPrefix(value, "cpus="))
		if err != nil || n < 1 || n > 254 {
			return errors.New("must be 1 to 254")
		}
	case "kernel", "initrd":
		if !given && (name == "initrd" || l.Machine == "none") {
			return nil
		}
		_, err := os.Stat(value)
		return err
	case "append":
		for _, p := range strings.Fields(value) {
			if _, v, _ := strings.Cut(p, "="); len(v) > 255 {
				return fmt.Errorf("the value of %.20s... is too long", p)
			}
		}
	case "name":
		if !strings.HasPrefix(value, "sandbox-") && l.Machine != "none" || len(value) > 255 {
			return errors.New("not a pod's")
		}
	case "serial":
		if l.Machine == "none" {
			return nil
		}
		kv, err := l.server(value)
		if err != nil {
			return err
		}
		if kv["type"] != "socket" {
			return errors.New("not a socket")
		}
		l.Console = kv["path"]
		return only(kv, "path", "server", "nowait")
	case "qmp":
		path, ok := strings.CutPrefix(value, "unix:")
		kv, err := l.server(path)
		if err != nil || !ok {
			return fmt.Errorf("not a socket: %w", err)
		}
		l.QMP = kv["type"]
		return only(kv, "server", "nowait")
	case "global":
		if given && (value != "pcie-root-port.fast-unplug=1" || l.Machine == "microvm") {
			return errors.New("unknown property")
		}
	}
	return nil
}

// server is split for a socket that is bound: both bare flags must be there.
func (l *StratoVirtLine) server(value string) (map[string]string, error) {
	kv, err := l.split(value)
	if err != nil {
		return nil, err
	}
	for _, flag := range []string{"server", "nowait"} {
		if v, ok := kv[flag]; !ok || v != "" {
			return nil, fmt.Errorf("the bare flag %q is missing", flag)
		}
	}
	if len(cmp.Or(kv["path"], kv["type"])) > 108 {
		return nil, errors.New("the path is too long")
	}
	return kv, nil
}

func (l *StratoVirtLine) add(option string, kv map[string]string) error {
	define := func(properties ...string) error {
		key := option + ":" + kv["id"]
		if kv["id"] == "" || l.defined[key] != nil {
			return errors.New("the id is missing or taken")
		}
		l.defined[key] = kv
		return only(kv, properties...)
	}
	switch option {
	case "drive":
		fi, err := os.Stat(kv["file"])
		if err != nil {
			return err
		}
		if mode := fi.Mode(); !mode.IsRegular() && mode&os.ModeDevice == 0 {
			return errors.New("neither a regular file nor a block device")
		}
		if kv["if"] == "pflash" {
			if l.Machine == "microvm" || l.pflash[kv["unit"]] || kv["format"] != "raw" {
				return errors.New("no such pflash, or it is taken")
			}
			l.pflash[kv["unit"]] = true
			return only(kv, "file", "if", "format", "unit", "readonly")
		}
		direct, aio := kv["direct"] != "off", kv["aio"]
		if aio == "off" && direct || aio == "native" && !direct {
			return errors.New("aio and direct do not fit")
		}
		if kv["readonly"] != "on" {
			return errors.New("the image is shared by all pods and must be read-only")
		}
		return define("id", "file", "readonly", "direct", "aio", "format")
	case "object":
		if kv["type"] != "rng-random" {
			return errors.New("unknown object type")
		}
		return define("id", "filename")
	case "netdev":
		if kv["type"] != "tap" {
			return errors.New("not a tap")
		}
		if err := l.fd(kv["fd"], "netdev "+kv["id"]); err != nil {
			return err
		}
		return define("id", "fd", "vhost")
	case "chardev":
		if kv["type"] != "socket" || len(kv["path"]) > 108 {
			return errors.New("not a socket")
		}
		for _, flag := range []string{"server", "nowait"} {
			if v, ok := kv[flag]; ok && v != "" {
				return fmt.Errorf("%s is a bare flag", flag)
			}
		}
		return define("id", "path", "server", "nowait")
	}
	return l.device(kv)
}

func (l *StratoVirtLine) device(kv map[string]string) error {
	if kv["id"] == "" || l.ids[kv["id"]] {
		return errors.New("the id is missing or taken")
	}
	l.ids[kv["id"]] = true
	micro := l.Machine == "microvm"
	if kv["type"] == "pcie-root-port" {
		if micro {
			return errors.New("unsupported device")
		}
		port, err := strconv.ParseUint(kv["port"], 0, 8)
		if err != nil || port == 0 {
			return fmt.Errorf("no port number: %w", err)
		}
		l.RootPorts[kv["id"]] = true
		if err := l.slot(kv); err != nil {
			return err
		}
		return only(kv, "id", "port", "bus", "addr", "chassis")
	}
	if kv["type"] == "virtserialport" {
		return l.port(kv)
	}
	suffix := "-pci"
	if micro {
		suffix = "-device"
	}
	kind, ok := strings.CutSuffix(kv["type"], suffix)
	properties := stratoDevices[kind]
	if !ok || properties == nil {
		return fmt.Errorf("unsupported device: %s", kv["type"])
	}
	if !micro {
		if err := l.slot(kv); err != nil {
			return err
		}
		properties = append([]string{"bus", "addr"}, properties...)
	}
	if err := only(kv, properties...); err != nil {
		return err
	}
	for property, option := range map[string]string{"rng": "object", "drive": "drive", "netdev": "netdev", "chardev": "chardev"} {
		if !slices.Contains(properties, property) {
			continue
		}
		key := option + ":" + kv[property]
		if l.defined[key] == nil || l.consumed[key] {
			return fmt.Errorf("%s is not there or in use", key)
		}
		l.consumed[key] = true
	}
	switch kind {
	case "virtio-blk":
		if l.blocks++; micro && l.blocks > 4 {
			return errors.New("a maximum of 4 block replaceable devices is supported")
		}
	case "virtio-serial":
		if l.serial {
			return errors.New("only one virtio-serial device is supported")
		}
		l.serial = true
	case "virtio-net":
		if l.nets++; micro && l.nets > 2 {
			return errors.New("a maximum of 2 net replaceable devices is supported")
		}
		if _, err := net.ParseMAC(kv["mac"]); err != nil || len(kv["mac"]) != 17 {
			return fmt.Errorf("not a MAC: %w", err)
		}
	case "vhost-vsock":
		cid, err := strconv.ParseUint(kv["guest-cid"], 10, 64)
		if err != nil || cid < 3 || cid > 4294967294 {
			return errors.New("not a guest's context id")
		}
		if err := l.fd(kv["vhostfd"], kv["type"]); err != nil {
			return err
		}
	case "vhost-user-fs":
		if !l.share {
			return errors.New("needs mem-share=on")
		}
		if len(kv["tag"]) > 35 || kv["tag"] == "" {
			return errors.New("not a tag")
		}
		l.Share = l.defined["chardev:"+kv["chardev"]]["path"]
	}
	l.Devices = append(l.Devices, kv)
	return nil
}

// port makes a port of the virtio-serial device.
func (l *StratoVirtLine) port(kv map[string]string) error {
	if l.Release.before(3) {
		return errors.New("unsupported device: virtserialport")
	}
	key := "chardev:" + kv["chardev"]
	backend := l.defined[key]
	nr, err := strconv.Atoi(kv["nr"])
	switch {
	case !l.serial:
		return errors.New("no virtio-serial device is specified")
	case backend == nil || l.consumed[key]:
		return fmt.Errorf("%s is not there or in use", key)
	case l.Machine == "microvm" || err != nil || nr < 1 || nr > 30:
		return errors.New("no port of that number")
	}
	for _, flag := range []string{"server", "nowait"} {
		if _, ok := backend[flag]; !ok {
			return fmt.Errorf("the bare flag %q is missing", flag)
		}
	}
	l.consumed[key], l.Agent = true, backend["path"]
	return only(kv, "id", "chardev", "nr")
}

// slot takes a slot of pcie.0.
func (l *StratoVirtLine) slot(kv map[string]string) error {
	n, err := strconv.ParseUint(kv["addr"], 0, 8)
	if kv["bus"] != "pcie.0" || err != nil || n > 31 {
		return fmt.Errorf("no slot %q on bus %q", kv["addr"], kv["bus"])
	}
	if l.slots[int(n)] {
		return fmt.Errorf("devfn %d has been used", n<<3)
	}
	l.slots[int(n)] = true
	return nil
}

func (l *StratoVirtLine) fd(value, user string) error {
	fd, err := strconv.Atoi(value)
	if err != nil {
		return fmt.Errorf("no descriptor: %w", err)
	}
	if _, taken := l.fds[fd]; taken {
		return fmt.Errorf("descriptor %d is used twice", fd)
	}
	l.fds[fd] = user
	return nil
}

func only(kv map[string]string, properties ...string) error {
	for key := range kv {
		if key != "type" && !slices.Contains(properties, key) {
			return fmt.Errorf("unknown key %q", key)
		}
	}
	return nil
}

func runStratoVirt(args []string) error {
	inherited, err := openFDs()
	if err != nil {
		return err
	}
	b, err := readBehaviour()
	if err != nil {
		return err
	}
	// A word with two hyphens is an option only with an equals sign.
	if len(args) == 1 && args[0] == "--version" {
		return errors.New("found argument '--version' which wasn't expected, or isn't valid in this context")
	}
	if len(args) == 1 && (args[0] == "-version" || args[0] == "-V") {
		fmt.Println(b.Version)
		return nil
	}
	release, err := ParseRelease(b.Release)
	if err != nil {
		return err
	}
	line, err := ParseStratoVirt(release, args)
	if err != nil {
		return err
	}
	if err := runStratoVirtLine(b, line, inherited); err != nil {
		line.fail(err)
		exit(1)
	}
	return nil
}

func runStratoVirtLine(b Behaviour, line *StratoVirtLine, inherited map[int]bool) error {
	for fd, user := range line.fds {
		if !inherited[fd] {
			return fmt.Errorf("%s: descriptor %d is bad", user, fd)
		}
		delete(inherited, fd)
	}
	for fd := range inherited {
		return fmt.Errorf("descriptor %d was inherited for nothing", fd)
	}
	fi, err := os.Stdout.Stat()
	if err != nil {
		return err
	}
	if fi.Mode().IsRegular() && !line.Release.before(3) {
		// That it could not log is printed there, with the log locked, and must not fail as well.
		return errors.New("the standard output is a file, which a full filesystem breaks")
	}
	io.WriteString(line.log(), b.Stderr)
	if b.Exit != 0 {
		exit(b.Exit)
	}
	return (&strato{behaviour: b, line: line, nodes: map[string]bool{}, devices: map[string]string{}, leaving: map[string]bool{}}).run()
}

// log is where StratoVirt logs.
func (l *StratoVirtLine) log() *os.File {
	if l.Release.before(3) && l.Options["D"] != "" {
		return os.Stdout
	}
	return os.Stderr
}

// fail says the error with which StratoVirt ends once it has understood its arguments: in its log, if it
// was told to have one. Before, the standard error is the place.
func (l *StratoVirtLine) fail(err error) {
	if l.Options["D"] == "" {
		fmt.Fprintf(os.Stderr, "%v\r\n", err)
		return
	}
	fmt.Fprintf(l.log(), "%s: [%d][%d][src/main.rs: 0]:ERROR: %v\r\n\n",
		time.Now().Format("2006-01-02T15:04:05.000000000"), os.Getpid(), unix.Gettid(), err)
}

// strato is a running stand-in.
type strato struct {
	behaviour Behaviour
	line      *StratoVirtLine
	server    *Server
	end       func()

	mu      sync.Mutex
	nodes   map[string]bool
	devices map[string]string // and their buses
	leaving map[string]bool   // devices that the guest was asked to let go
}

func (s *strato) run() error {
	fail := func(at string) error {
		if s.behaviour.FailAt == at {
			return fmt.Errorf("failed at %s, as told", at)
		}
		return nil
	}
	if err := fail("monitor"); err != nil {
		return err
	}
	// The monitor listens before anything else is there.
	monitor, err := s.bind(s.line.QMP, !s.line.Release.before(3))
	if err != nil {
		return err
	}
	defer os.Remove(s.line.QMP)
	if s.line.Machine == "none" {
		return (&Server{StratoVirt: s.behaviour.Release, Silent: s.behaviour.Silent, Greeting: greeting(s.behaviour)}).Serve(monitor)
	}
	if err := fail("realize"); err != nil {
		return err
	}
	if s.line.Share != "" {
		conn, err := net.Dial("unix", s.line.Share)
		if err != nil {
			return fmt.Errorf("cannot connect to the vhost-user daemon: %w", err)
		}
		defer conn.Close()
	}
	console, err := s.bind(s.line.Console, true)
	if err != nil {
		return err
	}
	defer os.Remove(s.line.Console)
	if s.line.Agent != "" {
		agent, err := s.bind(s.line.Agent, true)
		if err != nil {
			return err
		}
		defer os.Remove(s.line.Agent)
		go (&standIn{behaviour: s.behaviour}).serveAgent(agent)
	}
	if err := fail("run"); err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGSYS)
	end := make(chan struct{})
	s.end = sync.OnceFunc(func() { close(end) })
	said := make(chan struct{})
	go s.serveConsole(console, said)
	s.server = &Server{
		Silent:     s.behaviour.Silent,
		StratoVirt: s.behaviour.Release,
		Greeting:   greeting(s.behaviour),
		GarbageOn:  s.behaviour.GarbageOn,
		DieAfter:   s.behaviour.DieAfter,
		OnDie:      func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) },
		Commands:   s.commands(),
	}
	go func() {
		if s.behaviour.Console != "" {
			// What a guest prints before its console has a reader is lost, in a real one. Here a driver
			// that comes for the console only after the greeting does not get any further.
			<-said
		}
		s.server.Serve(monitor)
	}()
	select {
	case sig := <-signals:
		return s.interrupted(sig)
	case <-end:
		return nil
	}
}

// interrupted ends it as a signal does, for which only the older versions have a status.
func (s *strato) interrupted(sig os.Signal) error {
	words, fails := fmt.Sprintf("Received kill signal, signal number: %d", sig), s.line.Release.before(3)
	if sig == syscall.SIGSYS { // from seccomp
		words, fails = "Received a bad system call, number: 0", s.line.Release.before(4)
	}
	fmt.Fprintf(os.Stderr, "%s \r\n", words)
	if fails {
		for _, socket := range []string{s.line.QMP, s.line.Console, s.line.Agent} {
			os.Remove(socket)
		}
		exit(1)
	}
	return nil
}

func (s *strato) bind(path string, replace bool) (*net.UnixListener, error) {
	if replace {
		os.Remove(path)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return l, os.Chmod(path, 0o600)
}

func (s *strato) serveConsole(l net.Listener, said chan<- struct{}) {
	for first := true; ; first = false {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		if first {
			io.WriteString(conn, s.behaviour.Console)
			close(said)
			if s.behaviour.Panic {
				time.Sleep(200 * time.Millisecond) // no guest is that quick that runs only after the greeting
				s.end()
				return
			}
		}
		io.Copy(io.Discard, conn) // one client at a time
		conn.Close()
	}
}

// commands is what the stand-in's monitor knows.
func (s *strato) commands() map[string]Handler {
	strict := func(f func(json.RawMessage) (any, error)) Handler {
		return func(args json.RawMessage, file *os.File) (any, error) {
			if file != nil {
				file.Close()
				return nil, errors.New("a descriptor with a command that takes none")
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			return f(args)
		}
	}
	commands := map[string]Handler{
		"query-status": strict(func(json.RawMessage) (any, error) {
			status := s.behaviour.Status
			if status == "" {
				status = "running"
			}
			return map[string]any{"status": status, "running": status == "running", "singlestep": false}, nil
		}),
		"quit": strict(func(json.RawMessage) (any, error) {
			if !s.behaviour.IgnoreQuit {
				s.end()
			}
			return nil, nil
		}),
		"blockdev-add": strict(s.addNode),
		"blockdev-del": strict(s.deleteNode),
		"device_add":   strict(s.addDevice),
		"device_del":   strict(s.deleteDevice),
	}
	if name := s.behaviour.Refuse; name != "" {
		commands[name] = func(json.RawMessage, *os.File) (any, error) { return nil, errors.New("refused, as told") }
	}
	if name := s.behaviour.PowerOffOn; name != "" {
		commands[name] = strict(func(json.RawMessage) (any, error) {
			s.end()
			return nil, nil
		})
	}
	if name := s.behaviour.ResetOn; name != "" {
		commands[name] = func(json.RawMessage, *os.File) (any, error) {
			s.server.Emit("RESET", map[string]bool{"guest": true})
			return nil, nil
		}
	}
	return commands
}

// BlockdevAdd are the arguments of blockdev-add that the driver may use.
type BlockdevAdd struct {
	NodeName string `json:"node-name"`
	Driver   string `json:"driver"`
	ReadOnly bool   `json:"read-only"`
	Cache    *struct {
		Direct  *bool `json:"direct"`
		NoFlush bool  `json:"no-flush"`
	} `json:"cache"`
	File struct {
		Driver   string  `json:"driver"`
		Filename string  `json:"filename"`
		AIO      *string `json:"aio"`
	} `json:"file"`
}

// ParseBlockdevAdd understands the arguments of blockdev-add as the release does.
func ParseBlockdevAdd(r Release, args []byte) (*BlockdevAdd, error) {
	var a BlockdevAdd
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, &unparsed{err}
	}
	if a.NodeName == "" || a.Driver != "raw" || a.File.Driver != "file" {
		return nil, errors.New("not a node that can be made")
	}
	if r.before(3) {
		if a.File.AIO != nil {
			return nil, &unparsed{errors.New("unknown field `aio`")}
		}
		return &a, nil
	}
	direct := a.Cache == nil || a.Cache.Direct == nil || *a.Cache.Direct
	aio := "off"
	if a.File.AIO != nil {
		aio = *a.File.AIO
	}
	switch {
	case direct && aio == "off":
		return nil, errors.New("low performance expected when use sync io with \"direct\" on")
	case !direct && aio == "native":
		return nil, errors.New("native aio type should be used with \"direct\" on")
	}
	return &a, nil
}

func (s *strato) addNode(args json.RawMessage) (any, error) {
	a, err := ParseBlockdevAdd(s.line.Release, args)
	if err != nil {
		return nil, err
	}
	if _, taken := s.nodes[a.NodeName]; taken {
		return nil, errors.New("the node is there already")
	}
	flags := os.O_RDWR
	if a.ReadOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(a.File.Filename, flags|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	f.Close()
	s.nodes[a.NodeName] = false
	return nil, nil
}

func (s *strato) deleteNode(args json.RawMessage) (any, error) {
	var a struct {
		NodeName string `json:"node-name"`
	}
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, &unparsed{err}
	}
	if used, ok := s.nodes[a.NodeName]; !ok || used || s.line.Machine == "microvm" {
		return nil, errors.New("") // as StratoVirt, without a word
	}
	delete(s.nodes, a.NodeName)
	return nil, nil
}

func (s *strato) addDevice(args json.RawMessage) (any, error) {
	var a struct {
		ID     string `json:"id"`
		Driver string `json:"driver"`
		Addr   string `json:"addr"`
		Bus    string `json:"bus"`
		Drive  string `json:"drive"`
		Serial string `json:"serial"`
	}
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, &unparsed{err}
	}
	slot, err := strconv.ParseUint(a.Addr, 0, 8)
	switch used, known := s.nodes[a.Drive]; {
	case a.Driver != "virtio-blk-pci" || s.line.Machine == "microvm":
		return nil, errors.New("unsupported device")
	case !s.line.RootPorts[a.Bus] || err != nil || slot != 0:
		return nil, errors.New("hot plug is for slot 0 of a root port")
	case !known || used:
		return nil, errors.New("no such drive, or it is in use")
	case s.devices[a.ID] != "":
		return nil, errors.New("the id is taken")
	case len(a.Serial) > 20:
		return nil, errors.New("the serial is too long")
	}
	for _, bus := range s.devices {
		if bus == a.Bus {
			return nil, errors.New("the root port is taken")
		}
	}
	s.devices[a.ID], s.nodes[a.Drive] = a.Bus, true
	return nil, nil
}

func (s *strato) deleteDevice(args json.RawMessage) (any, error) {
	var a struct {
		ID string `json:"id"`
	}
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, &unparsed{err}
	}
	if s.devices[a.ID] == "" {
		return nil, &Refusal{"DeviceNotFound", "Device " + a.ID + " not found"}
	}
	if s.leaving[a.ID] {
		return nil, verbatim("Guest is still on the fly of another (un)plugging")
	}
	if s.behaviour.IgnoreUnplug {
		s.leaving[a.ID] = true
		return nil, nil
	}
	if s.behaviour.DeafToUnplug > 0 {
		s.behaviour.DeafToUnplug--
		return nil, nil
	}
	delete(s.devices, a.ID)
	s.nodes[a.ID] = false
	s.server.Emit("DEVICE_DELETED", map[string]string{"device": a.ID, "path": "/machine/peripheral/" + a.ID})
	return nil, nil
}
