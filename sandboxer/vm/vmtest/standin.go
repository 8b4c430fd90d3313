package vmtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/mux"
)

// Behaviour is what a stand-in does beside what QEMU would do. The zero value behaves.
type Behaviour struct {
	// Version is the first line of --version (StratoVirt's: -version); empty means a plausible one.
	Version string
	// Release is that of a StratoVirt, whatever it says of itself; StratoVirtStandIn sets it.
	Release string
	// Stderr is said at the start, by a StratoVirt in its log, wherever its version has that; with Exit
	// set, the program then ends with that status.
	Stderr string
	Exit   int
	// Silent makes the monitor never greet.
	Silent bool
	// DieAfter ends the program by SIGKILL instead of answering the n-th command.
	DieAfter int
	// Status is the answer to query-status; empty means running.
	Status string
	// Console is printed on the serial line; with Panic set the program ends well after it.
	Console string
	Panic   bool
	// Agent serves the multiplex and says hello. HelloBytes is sent instead of a hello.
	Agent      bool
	HelloBytes []byte
	// IgnoreQuit and IgnoreUnplug make the program refuse to end, and the guest to let go.
	IgnoreQuit, IgnoreUnplug bool
	// DeafToUnplug is how often the guest overhears that it is to let a disk go.
	DeafToUnplug int
	// Refuse is a command that is answered with an error.
	Refuse string
	// ResetOn is a command during which the guest of a StratoVirt reboots.
	ResetOn string
	// PowerOffOn is a command during which the guest powers off.
	PowerOffOn string
	// FailAt makes a StratoVirt end with an error where it stands for its start: before it binds the
	// monitor ("monitor"), with the monitor bound ("realize"), with all bound and nobody greeted ("run").
	FailAt string
	// Greeting is what the monitor says instead of a greeting, if it is not empty.
	Greeting string
	// GarbageOn is a command that is answered with what is no JSON.
	GarbageOn string
}

const behaviourFile = "behaviour.json"

// StandIn makes a QEMU that behaves as told and returns its path. The test's TestMain must call
// RunStandIn first.
func StandIn(t testing.TB, b Behaviour) string {
	t.Helper()
	return standInNamed(t, "qemu-system-x86_64", b)
}

func standInNamed(t testing.TB, name string, b Behaviour) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	config, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, behaviourFile), config, 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// keepInherited makes all descriptors but the standard streams close on exec.
func keepInherited() {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}

// RunStandIn turns this process into a QEMU or a StratoVirt and never returns, if it was started as one.
// Otherwise it keeps for this process what it inherited itself beside the standard streams: a stand-in
// refuses descriptors that nobody named, and those of whoever runs the tests are not the driver's.
func RunStandIn() {
	if filepath.Base(os.Args[0]) == stratoVirtProgram {
		if err := runStratoVirt(os.Args[1:]); err != nil {
			fmt.Fprintf(os.Stderr, "Error: %v\n", err)
			exit(1)
		}
		exit(0)
	}
	if !strings.HasPrefix(filepath.Base(os.Args[0]), "qemu-system-") {
		keepInherited()
		return
	}
	if err := runStandIn(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "qemu-system-x86_64: %v\n", err)
		exit(1)
	}
	exit(0)
}

// exit ends the process without the second that the race detector waits at the end of every program.
func exit(status int) { syscall.Exit(status) }

func runStandIn(args []string) error {
	inheritedFDs, err := openFDs()
	if err != nil {
		return err
	}
	b, err := readBehaviour()
	if err != nil {
		return err
	}
	if len(args) == 1 && (args[0] == "--version" || args[0] == "-version") {
		if b.Version == "" {
			b.Version = "QEMU emulator version 7.2.22 (stand-in)"
		}
		fmt.Println(b.Version)
		return nil
	}
	if len(args) == 2 && args[0] == "-L" && args[1] == "help" {
		fmt.Println(filepath.Dir(os.Args[0])) // where its firmware is, if it has any
		return nil
	}
	if len(args) > 1 && args[1] == "kvm-probe" {
		// A boot that shows whether KVM works; nothing of it is worth checking here.
		io.WriteString(os.Stdout, b.Console)
		io.WriteString(os.Stderr, b.Stderr)
		if b.Silent {
			syscall.Pause()
		}
		exit(b.Exit)
	}
	cl, err := ParseCommandLine(args)
	if err != nil {
		return err
	}
	if err := cl.checkFDs(inheritedFDs); err != nil {
		return err
	}
	io.WriteString(os.Stderr, b.Stderr)
	if b.Exit != 0 {
		exit(b.Exit)
	}
	return (&standIn{behaviour: b, line: cl, disks: map[string]string{}, nodes: map[string]*os.File{}, sets: map[int]*os.File{}}).run()
}

// readBehaviour returns what the program was made to do.
func readBehaviour() (b Behaviour, err error) {
	config, err := os.ReadFile(filepath.Join(filepath.Dir(os.Args[0]), behaviourFile))
	if err == nil {
		err = json.Unmarshal(config, &b)
	}
	return b, err
}

// openFDs lists the descriptors that the process has inherited beyond the standard ones.
func openFDs() (map[int]bool, error) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	fds := make(map[int]bool)
	for _, e := range entries {
		var fd int
		fmt.Sscan(e.Name(), &fd)
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		// What Go's runtime opens for itself, and the directory that was just read.
		if err != nil || fd <= 2 || strings.HasPrefix(target, "anon_inode:[event") || strings.HasSuffix(target, "/fd") ||
			strings.HasPrefix(target, "/sys/fs/cgroup/") {
			continue
		}
		fds[fd] = true
	}
	return fds, nil
}

// standIn is a running stand-in.
type standIn struct {
	behaviour Behaviour
	line      *CommandLine
	server    *Server

	mu      sync.Mutex
	sets    map[int]*os.File    // fd sets, by number
	nodes   map[string]*os.File // block nodes
	disks   map[string]string   // devices and their buses
	nextSet int
}

func (s *standIn) run() error {
	end, said := make(chan struct{}), make(chan struct{})
	fd, ok := s.line.Listening["console"]
	if !ok || s.behaviour.Console == "" {
		close(said)
	}
	if ok {
		l, err := listener(fd)
		if err != nil {
			return err
		}
		go s.serveConsole(l, end, said)
	}
	if fd, ok := s.line.Listening["agent"]; ok {
		l, err := listener(fd)
		if err != nil {
			return err
		}
		go s.serveAgent(l)
	}
	l, err := listener(s.line.Listening["qmp"])
	if err != nil {
		return err
	}
	s.server = &Server{
		Silent:   s.behaviour.Silent,
		DieAfter: s.behaviour.DieAfter,
		OnDie:    func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) },
		Commands: s.commands(end),

		Greeting: greeting(s.behaviour), GarbageOn: s.behaviour.GarbageOn,
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	go func() {
		// So that a test knows what is on the console when a command ends the machine.
		<-said
		s.server.Serve(l)
	}()
	select {
	case <-term:
		fmt.Fprintf(os.Stderr, "qemu-system-x86_64: terminating on signal 15 from pid %d (tests)\n", os.Getppid())
	case <-end:
	}
	return nil
}

func greeting(b Behaviour) []byte {
	if b.Greeting == "" {
		return nil
	}
	return []byte(b.Greeting)
}

func listener(fd int) (*net.UnixListener, error) {
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// serveConsole says its words to whom comes first, and closes said if there are any.
func (s *standIn) serveConsole(l net.Listener, end, said chan struct{}) {
	first := true
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		if first {
			first = false
			io.WriteString(conn, s.behaviour.Console)
			if s.behaviour.Console != "" {
				close(said)
			}
			if s.behaviour.Panic {
				close(end)
				return
			}
		}
		io.Copy(io.Discard, conn)
		conn.Close()
	}
}

func (s *standIn) serveAgent(l *net.UnixListener) {
	var unanswered []net.Conn
	defer func() {
		for _, conn := range unanswered {
			conn.Close()
		}
	}()
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		if !s.behaviour.Agent {
			unanswered = append(unanswered, conn) // by a guest that never opens its port
			continue
		}
		go func() {
			defer conn.Close()
			ServeAgent(context.Background(), conn, s.behaviour.HelloBytes)
		}()
	}
}

// ServeAgent is an agent behind a connection of the multiplex: it says hello, or sends helloBytes
// instead, and echoes on every port that the host opens.
func ServeAgent(ctx context.Context, conn *net.UnixConn, helloBytes []byte) error {
	f, err := conn.File()
	if err != nil {
		return err
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return err
	}
	unix.SetNonblock(fd, true)
	port := os.NewFile(uintptr(fd), "port")
	defer port.Close()
	return mux.Serve(ctx, port, func(session *mux.Session) {
		go callHome(ctx, session, helloBytes)
		for {
			conn, _, err := session.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	})
}

func callHome(ctx context.Context, session *mux.Session, helloBytes []byte) {
	conn, err := session.Open(ctx, protocol.PortHello)
	if err != nil {
		return
	}
	defer conn.Close()
	if helloBytes != nil {
		conn.Write(helloBytes)
	} else {
		protocol.WriteMessage(conn, &protocol.Hello{ProtocolVersion: protocol.Version, AgentVersion: "stand-in"})
	}
	protocol.ReadMessage(conn, new(protocol.HelloReply))
}

// commands is what the stand-in's monitor knows.
func (s *standIn) commands(end chan struct{}) map[string]Handler {
	var once sync.Once
	locked := func(f func(args json.RawMessage, file *os.File) (any, error)) Handler {
		return func(args json.RawMessage, file *os.File) (any, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return f(args, file)
		}
	}
	commands := map[string]Handler{
		"query-status": func(json.RawMessage, *os.File) (any, error) {
			status := s.behaviour.Status
			if status == "" {
				status = "running"
			}
			return map[string]any{"status": status, "running": status == "running", "singlestep": false}, nil
		},
		"quit": func(json.RawMessage, *os.File) (any, error) {
			if !s.behaviour.IgnoreQuit {
				once.Do(func() { close(end) })
			}
			return nil, nil
		},
		"add-fd":                  locked(s.addFD),
		"remove-fd":               locked(s.removeFD),
		"blockdev-add":            locked(s.addNode),
		"blockdev-del":            locked(s.deleteNode),
		"device_add":              locked(s.addDevice),
		"device_del":              locked(s.deleteDevice),
		"qom-list":                locked(s.listDevices),
		"query-named-block-nodes": locked(s.listNodes),
	}
	if name := s.behaviour.Refuse; name != "" {
		commands[name] = func(json.RawMessage, *os.File) (any, error) {
			return nil, errors.New("refused, as told")
		}
	}
	if name := s.behaviour.PowerOffOn; name != "" {
		commands[name] = func(json.RawMessage, *os.File) (any, error) {
			once.Do(func() { close(end) })
			return nil, nil
		}
	}
	return commands
}

func (s *standIn) addFD(args json.RawMessage, file *os.File) (any, error) {
	var a struct {
		Opaque string `json:"opaque"`
	}
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, err
	}
	if file == nil {
		return nil, verbatim("No file descriptor supplied via SCM_RIGHTS")
	}
	set := s.nextSet
	s.nextSet++
	s.sets[set] = file
	return map[string]int{"fdset-id": set, "fd": int(file.Fd())}, nil
}

func (s *standIn) removeFD(args json.RawMessage, _ *os.File) (any, error) {
	var a struct {
		Set *int `json:"fdset-id"`
	}
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, err
	}
	if a.Set == nil || s.sets[*a.Set] == nil {
		return nil, verbatim("File descriptor named 'fdset-id' not found")
	}
	s.sets[*a.Set].Close()
	delete(s.sets, *a.Set)
	return nil, nil
}

func (s *standIn) addNode(args json.RawMessage, _ *os.File) (any, error) {
	var a struct {
		Driver   string `json:"driver"`
		NodeName string `json:"node-name"`
		ReadOnly bool   `json:"read-only"`
		Discard  string `json:"discard"`
		File     struct {
			Driver   string `json:"driver"`
			Filename string `json:"filename"`
		} `json:"file"`
	}
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, err
	}
	var set int
	if n, err := fmt.Sscanf(a.File.Filename, "/dev/fdset/%d", &set); n != 1 || err != nil || s.sets[set] == nil {
		return nil, verbatim("Could not open '%s'", a.File.Filename)
	}
	if a.Driver != "raw" || a.File.Driver != "file" && a.File.Driver != "host_device" {
		return nil, errors.New("unknown driver")
	}
	if len(a.NodeName) > 31 || s.nodes[a.NodeName] != nil {
		return nil, verbatim("Invalid or duplicate node-name")
	}
	fd, err := unix.FcntlInt(s.sets[set].Fd(), unix.F_GETFL, 0)
	if err != nil {
		return nil, err
	}
	if writable := fd&unix.O_ACCMODE == unix.O_RDWR; writable == a.ReadOnly {
		return nil, errors.New("the descriptor's access mode does not fit")
	}
	dup, err := unix.FcntlInt(s.sets[set].Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	s.nodes[a.NodeName] = os.NewFile(uintptr(dup), a.NodeName)
	return nil, nil
}

func (s *standIn) deleteNode(args json.RawMessage, _ *os.File) (any, error) {
	var a struct {
		NodeName string `json:"node-name"`
	}
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, err
	}
	if s.nodes[a.NodeName] == nil {
		return nil, verbatim("Failed to find node with node-name='%s'", a.NodeName)
	}
	if _, used := s.disks[a.NodeName]; used {
		return nil, verbatim("Node %s is in use", a.NodeName)
	}
	s.nodes[a.NodeName].Close()
	delete(s.nodes, a.NodeName)
	return nil, nil
}

func (s *standIn) addDevice(args json.RawMessage, _ *os.File) (any, error) {
	var a struct {
		Driver string `json:"driver"`
		ID     string `json:"id"`
		Bus    string `json:"bus"`
		Drive  string `json:"drive"`
		Serial string `json:"serial"`
		Target *int   `json:"scsi-id"`
	}
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, err
	}
	if a.Driver == "scsi-hd" && s.line.SCSI && a.Bus == "scsi0.0" && a.Target != nil && s.nodes[a.Drive] != nil && a.ID == a.Drive {
		target := fmt.Sprint(a.Bus, ":", *a.Target)
		for _, bus := range s.disks {
			if bus == target {
				return nil, verbatim("lun already used by '%s'", a.ID)
			}
		}
		s.disks[a.ID] = target
		return nil, nil
	}
	if a.Driver != "virtio-blk-pci" || a.Target != nil || s.nodes[a.Drive] == nil || a.ID != a.Drive {
		return nil, verbatim("Property 'virtio-blk-device.drive' can't find value")
	}
	if !s.line.RootPorts[a.Bus] {
		return nil, verbatim("Bus '%s' not found", a.Bus)
	}
	for _, bus := range s.disks {
		if bus == a.Bus {
			return nil, fmt.Errorf("PCI: slot 0 function 0 already occupied on %s", bus)
		}
	}
	s.disks[a.ID] = a.Bus
	return nil, nil
}

func (s *standIn) deleteDevice(args json.RawMessage, _ *os.File) (any, error) {
	var a struct {
		ID string `json:"id"`
	}
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, err
	}
	if _, ok := s.disks[a.ID]; !ok {
		return nil, &Refusal{"DeviceNotFound", fmt.Sprintf("Device '%s' not found", a.ID)}
	}
	if s.behaviour.IgnoreUnplug {
		return nil, nil
	}
	if s.behaviour.DeafToUnplug > 0 {
		s.behaviour.DeafToUnplug--
		return nil, nil
	}
	delete(s.disks, a.ID)
	// As QEMU: the event for a part of the device comes first, and both may precede the answer.
	s.server.Emit("DEVICE_DELETED", map[string]string{"path": "/machine/peripheral/" + a.ID + "/virtio-backend"})
	s.server.Emit("DEVICE_DELETED", map[string]string{"device": a.ID, "path": "/machine/peripheral/" + a.ID})
	return nil, nil
}

func (s *standIn) listDevices(args json.RawMessage, _ *os.File) (any, error) {
	var a struct {
		Path string `json:"path"`
	}
	if err := DecodeStrictly(args, &a); err != nil || a.Path != "/machine/peripheral" {
		return nil, &Refusal{"DeviceNotFound", "Device '" + a.Path + "' not found"}
	}
	list := []map[string]string{{"name": "type", "type": "string"}}
	for id := range s.disks {
		list = append(list, map[string]string{"name": id, "type": "child<virtio-blk-pci>"})
	}
	return list, nil
}

func (s *standIn) listNodes(args json.RawMessage, _ *os.File) (any, error) {
	var a struct {
		Flat bool `json:"flat"`
	}
	if err := DecodeStrictly(args, &a); err != nil {
		return nil, err
	}
	list := []map[string]string{}
	for name := range s.nodes {
		list = append(list, map[string]string{"node-name": name, "drv": "raw"}, map[string]string{"node-name": "#block001", "drv": "file"})
	}
	return list, nil
}
