// The command vmm-task is PID 1 of a pod's virtual machine: it boots the guest, calls home, and
// runs the pod's containers as the host asks.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"kuasar.io/kuasar/guest/agent/boot"
	"kuasar.io/kuasar/guest/agent/cmdline"
	"kuasar.io/kuasar/guest/agent/console"
	"kuasar.io/kuasar/guest/agent/containers"
	"kuasar.io/kuasar/guest/agent/link"
	"kuasar.io/kuasar/guest/agent/logging"
	"kuasar.io/kuasar/guest/agent/namespaces"
	"kuasar.io/kuasar/guest/agent/network"
	"kuasar.io/kuasar/guest/agent/reaper"
	"kuasar.io/kuasar/guest/agent/sandbox"
	"kuasar.io/kuasar/guest/agent/shutdown"
	"kuasar.io/kuasar/guest/protocol"
	"kuasar.io/kuasar/guest/protocol/stdio"
	"kuasar.io/kuasar/guest/protocol/version"
)

func main() {
	// The binary leads two other lives, as a new container and as the pod's pause process.
	if containers.IsInit() {
		containers.Init()
	}
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case namespaces.PauseArg:
			namespaces.Pause()
		case "--version", "-version":
			fmt.Println("vmm-task", version.String())
			return
		}
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "vmm-task: this is PID 1 of a pod's virtual machine, not a program for a host")
		os.Exit(2)
	}
	defer shutdown.Guard()
	shutdown.Fatal(run())
}

// run only returns if the guest cannot serve, and says why: its error is never nil.
func run() error {
	began := time.Now()
	// The agent's memory is the pod's loss, but collecting it now would delay the pod: see settle.
	debug.SetGCPercent(400)

	if err := boot.Mount(); err != nil {
		return err
	}
	log := logging.New(os.Stderr)
	parameters, err := cmdline.Read()
	if err != nil {
		return err
	}
	log.SetLevel(parameters.LogLevel)
	warnings, err := boot.Configure(parameters)
	if err != nil {
		return err
	}
	for _, w := range append(parameters.Warnings, warnings...) {
		log.Warn(w)
	}
	ctx := context.Background()
	// Without its share the guest is no use, but it can say so: the host then knows why.
	shareErr := boot.Share(parameters.ShareType)
	if shareErr != nil {
		log.Error(shareErr.Error())
	}
	if err := network.Loopback(); err != nil {
		return err
	}
	start("reaper", func() error { reaper.Run(ctx); return nil })

	hub := stdio.NewHub()
	var pod *sandbox.Service
	tasks := containers.New(containers.Options{
		Hub:   hub,
		Log:   log.Logger,
		OnOOM: func(id string) { pod.OOM(id) },

		OnDelete:  func(d *protocol.Deleted) { pod.Deleted(d) },
		Listen:    link.ListenVsock,
		ContextID: link.ContextID,
	})
	machine := &shutdown.Machine{Stop: tasks.StopAll, Flush: log.Flush, Log: log.Logger}
	pod = sandbox.New(sandbox.Options{
		Containers: tasks,
		Namespaces: func(sharedPID bool, hostname string) error {
			defer shutdown.Guard()
			_, err := namespaces.Setup(sharedPID, hostname)
			return err
		},
		Ready:   settle,
		Share:   shareErr,
		Quiesce: machine.Quiesce,
		End:     machine.PowerOff,
		Log:     log.Logger,
	})
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(
		func(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
			defer shutdown.Guard()
			return method(ctx, unmarshal)
		}))
	if err != nil {
		return fmt.Errorf("cannot make the ttrpc server: %w", err)
	}
	tasks.Register(server)
	protocol.RegisterSandboxService(server, pod)

	start("signals", func() error {
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
		s := <-signals
		machine.Quiesce(signalGrace)
		machine.PowerOff("signal " + s.String())
		return nil
	})

	// Whoever measures a boot looks for this line; it comes whether or not a host can be reached.
	log.Info("agent ready", "version", version.String(), "took", time.Since(began).Round(time.Millisecond))
	home, err := link.Open(ctx, parameters.Transport, log.Logger)
	if err != nil {
		return err
	}
	services := map[uint32]func(net.Listener) error{
		protocol.PortTask:  func(l net.Listener) error { return server.Serve(ctx, l) },
		protocol.PortStdio: hub.Serve,
	}
	if parameters.Debug {
		services[protocol.PortConsole] = (&console.Console{Shell: parameters.DebugShell, Log: log.Logger}).Serve
	}
	for port, serve := range services {
		l, err := home.Listen(port)
		if err != nil {
			return err
		}
		start(fmt.Sprintf("port %d", port), func() error { return serve(l) })
	}
	err = home.Serve(ctx, func(_ context.Context, conn net.Conn) error { return link.Greet(conn, hello()) })
	return fmt.Errorf("cannot stay connected to the host: %w", err)
}

// signalGrace is what containers get when the guest itself is told to end.
const signalGrace = 10 * time.Second

// settle gives back what the boot took, once the pod is up and before its first container comes.
func settle() {
	time.AfterFunc(100*time.Millisecond, func() {
		debug.SetGCPercent(50)
		debug.FreeOSMemory()
	})
}

// start runs a part of the agent. Its failure is the agent's.
func start(name string, part func() error) {
	go func() {
		defer shutdown.Guard()
		if err := part(); err != nil {
			shutdown.Fatal(fmt.Errorf("cannot go on without %s: %w", name, err))
		}
	}()
}

func hello() *protocol.Hello {
	h := &protocol.Hello{
		ProtocolVersion: protocol.Version,
		OldestHost:      protocol.OldestHost,
		AgentVersion:    version.String(),
		Features:        []string{protocol.FeatureDirect},
	}
	var names unix.Utsname
	if err := unix.Uname(&names); err == nil {
		h.KernelRelease = unix.ByteSliceToString(names.Release[:])
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err == nil {
		h.UptimeNanos = up.Nano()
	}
	return h
}
