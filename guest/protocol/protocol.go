// Package protocol is what host and guest agree on: the messages (guest.proto), the ports of the
// guest link, the paths in the guest, the kernel parameters, and the framing of the hello.
//
// It is the only package that both sandboxer/ and guest/ import.
package protocol

// Version is the protocol version of this build. It is raised when a message changes its meaning;
// additions are announced by Hello.Features instead.
const Version = 1

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
	// the serial multiplex a stream that the guest opens.
	PortHello = 1027
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
