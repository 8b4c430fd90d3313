// Package protocol is what host and guest agree on: the messages (guest.proto), the ports of the
// guest link, the paths in the guest, the kernel parameters, and the framing of the hello.
//
// It is the only package that both sandboxer/ and guest/ import.
package protocol

// Version is the protocol version of this build, of its host's side and of its agent.
//
// The two sides of a running pod need not be of one build: a pod outlives upgrades and downgrades of
// the daemon, and its agent stays the one that it was booted with. So the rule is:
//
//   - Without raising Version a message may get a field whose absence means what was so before it
//     existed, an enumeration a value that only an answer to something new carries, a service a
//     method, the agent a kernel parameter (agents skip those that they do not know). What the other
//     side must know of before it is used, such as a method, gets a name in Hello.Features; names are
//     never used again for something else. Fields and numbers are never used again either.
//   - Version is raised when a message, a port, a path in the guest, or the framing of the hello, of
//     the standard streams or of the multiplex comes to mean something else, and when something is
//     taken away. The host's side then keeps the way in which it spoke with agents of the version
//     before, and OldestAgent stays, for one release at least: an upgrade is to find the pods alive.
//   - OldestHost of the agent follows Version unless the agent, told by HelloReply that its host is
//     older, goes on in the old way: only then does a downgrade find the pods manageable too.
//
// The hello and its answer themselves may only be added to.
const Version = 1

const (
	// OldestAgent is the oldest version of agents that the host's side of this build manages.
	OldestAgent = 1
	// OldestHost is the oldest version of hosts that the agent of this build works for.
	OldestHost = 1
)

// Ports of the guest link. They are vsock port numbers and, on the serial multiplex, the numbers
// that open a stream.
const (
	// PortTask is where the agent serves ttrpc: the Task API v2 and v3 and the Sandbox service.
	PortTask = 1024
	// PortConsole is the debug console, served only with the kernel parameter task.debug.
	PortConsole = 1025
	// PortStdio carries the standard streams of processes (package stdio).
	PortStdio = 1026
	// PortHello is the host's port to which the agent says hello: on vsock a port of CID 2, on
	// the serial multiplex a stream that the guest opens. On vsock the agent listens on the port of
	// this number, too, and says hello again to whoever of the host connects: a new daemon.
	PortHello = 1027
)

// FeatureDirect is the name in Hello.Features of Direct: clients make containers at the agent.
const FeatureDirect = "direct"

// What the guest's kernel can use and needs: processors, which guest/kernel builds it for (NR_CPUS), and MiB
// of memory to boot.
const (
	MaxVCPUs     = 64
	MinMemoryMiB = 64
)

// SerialPort is the name of the virtio-serial port that carries the multiplex.
const SerialPort = "kuasar.agent.0"

// ShareTag names the shared file system, and SharePath is where the guest mounts it.
const (
	ShareTag  = "kuasar"
	SharePath = "/run/kuasar/state"
)

// Paths in the guest that specs of containers refer to.
const (
	// StorageDir holds the mount points of Storage.
	StorageDir = "/run/kuasar/storage"
	// HostnamePath, HostsPath and ResolvConfPath are files made from SetupRequest.
	HostnamePath   = "/run/kuasar/sandbox/hostname"
	HostsPath      = "/run/kuasar/sandbox/hosts"
	ResolvConfPath = "/run/kuasar/sandbox/resolv.conf"
	// ShmPath is the pod's shared /dev/shm.
	ShmPath = "/run/kuasar/sandbox/shm"
	// NamespaceDir holds the persistent namespaces of the pod: ipc, uts and, if shared, pid.
	NamespaceDir = "/run/sandbox-ns"
)

// Kernel parameters that the agent reads from /proc/cmdline.
const (
	ParamLogLevel   = "task.log_level"    // trace, debug, info, warn, error
	ParamShareType  = "task.sharefs_type" // virtiofs or 9p
	ParamDebug      = "task.debug"        // bare word: serve the debug console
	ParamDebugShell = "task.debug_shell"  // path of the console's shell
	ParamCgroup     = "task.cgroup"       // v2 (default) or v1
	ParamTransport  = "task.transport"    // vsock or serial; without it, whichever device exists
)

// StdioScheme begins the stdin, stdout and stderr strings of Task.Create and Task.Exec that the
// host sends to the guest: StdioScheme followed by the token under which it opened the stream on
// PortStdio. An empty string means no stream.
const StdioScheme = "stdio://"

// VsockScheme begins the names of streams for which the guest listens, which is for direct containers
// only: VsockScheme, the guest's context id, a colon, and the port.
const VsockScheme = "vsock://"
