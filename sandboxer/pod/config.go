package pod

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/guest/protocol"
)

// maxID is the longest id of a pod, in bytes.
const maxID = 128

// longestSocket is the longest name of a socket in a pod's state directory.
const longestSocket = "virtiofsd.sock"

// maxSocketPath is what sun_path holds, without the terminating zero.
const maxSocketPath = 107

// CheckID refuses ids that could not be a file name, a cgroup and a part of a command line.
func CheckID(id string) error {
	if id == "" {
		return fmt.Errorf("the sandbox id is empty: %w", errdefs.ErrInvalidArgument)
	}
	if len(id) > maxID {
		return fmt.Errorf("the sandbox id has %d characters, more than %d: %w", len(id), maxID, errdefs.ErrInvalidArgument)
	}
	for i := range len(id) {
		c := id[i]
		alnum := c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !alnum && (i == 0 || c != '_' && c != '.' && c != '-') {
			return fmt.Errorf("the sandbox id %q has %q at position %d; letters and digits are allowed, and _ . - after the first: %w",
				id, c, i, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// CheckDir refuses a base directory in which the sockets of a pod with the usual id of 64 characters
// would have paths too long for the kernel.
func CheckDir(dir string) error {
	if !strings.HasPrefix(dir, "/") {
		return fmt.Errorf("the directory %q is not an absolute path", dir)
	}
	return checkSocketPath(dir, strings.Repeat("x", 64))
}

func checkSocketPath(dir, id string) error {
	n := len(dir) + 1 + len(id) + 1 + len(longestSocket)
	if n > maxSocketPath {
		return fmt.Errorf("the directory %s is too long by %d characters: a pod's sockets below it would have paths of %d bytes, and the kernel takes %d: %w",
			dir, n-maxSocketPath, n, maxSocketPath, errdefs.ErrInvalidArgument)
	}
	return nil
}

// checkConfig refuses what a pod in a virtual machine cannot be.
func checkConfig(c *cri.PodSandboxConfig, netns string) error {
	ns := c.GetLinux().GetSecurityContext().GetNamespaceOptions()
	switch {
	case ns.GetNetwork() == cri.NamespaceMode_NODE:
		return fmt.Errorf("the pod asks for the node's network (hostNetwork), and a virtual machine has a network of its own: "+
			"unset hostNetwork or choose another runtime class: %w", errdefs.ErrFailedPrecondition)
	case ns.GetPid() == cri.NamespaceMode_NODE:
		return fmt.Errorf("the pod asks for the node's processes (hostPID), and a virtual machine has a kernel of its own: "+
			"unset hostPID or choose another runtime class: %w", errdefs.ErrFailedPrecondition)
	case ns.GetIpc() == cri.NamespaceMode_NODE:
		return fmt.Errorf("the pod asks for the node's IPC (hostIPC), and a virtual machine has a kernel of its own: "+
			"unset hostIPC or choose another runtime class: %w", errdefs.ErrFailedPrecondition)
	case netns == "":
		return fmt.Errorf("netns_path is empty, as it is for pods on the node's network: "+
			"a pod in a virtual machine needs a network namespace of its own (iSulad makes one unless the pod asks for hostNetwork): %w", errdefs.ErrInvalidArgument)
	}
	if h := c.GetHostname(); len(h) > 64 || strings.ContainsFunc(h, notPrintable) {
		return fmt.Errorf("options: the hostname %q is longer than 64 bytes or not printable: %w", clip(h, 80), errdefs.ErrInvalidArgument)
	}
	dns := c.GetDnsConfig()
	for field, values := range map[string][]string{
		"servers": dns.GetServers(), "searches": dns.GetSearches(), "options": dns.GetOptions(),
	} {
		for _, v := range values {
			if v == "" || strings.ContainsFunc(v, notPrintable) {
				return fmt.Errorf("options: dns_config.%s has the entry %q: %w", field, clip(v, 80), errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

// notPrintable tells what would break a line of a configuration file.
func notPrintable(r rune) bool { return r <= ' ' || r == 0x7f }

// checkNetNS tells why path is not a network namespace.
func checkNetNS(path string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("netns_path %s: the pod's network namespace is gone: %w", path, errdefs.ErrFailedPrecondition)
		}
		return fmt.Errorf("netns_path %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return fmt.Errorf("netns_path %s is not a namespace; was it unmounted?: %w", path, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// sharedPID tells whether the pod's containers share one pid namespace. It is what the CRI's zero
// value means, so a configuration that says nothing shares.
func sharedPID(c *cri.PodSandboxConfig) bool {
	return c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == cri.NamespaceMode_POD
}

// setupRequest is what the agent has to apply for the whole pod. The clock and the entropy are the
// caller's to fill in, at the last moment.
func setupRequest(c *cri.PodSandboxConfig, network *protocol.Network) (*protocol.SetupRequest, error) {
	hostname := c.GetHostname()
	if hostname == "" {
		var err error
		if hostname, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("cannot find the node's hostname: %w", err)
		}
	}
	resolv, err := resolvConf(c.GetDnsConfig())
	if err != nil {
		return nil, err
	}
	return &protocol.SetupRequest{
		Hostname:           hostname,
		Hosts:              hosts(hostname, network),
		ResolvConf:         resolv,
		Sysctls:            c.GetLinux().GetSysctls(),
		Network:            network,
		SharedPidNamespace: sharedPID(c),
	}, nil
}

func hosts(hostname string, network *protocol.Network) []byte {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n")
	b.WriteString("::1\tlocalhost ip6-localhost ip6-loopback\n")
	b.WriteString("fe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	for _, i := range network.GetInterfaces() {
		for _, a := range i.GetAddresses() {
			ip, _, _ := strings.Cut(a, "/")
			fmt.Fprintf(&b, "%s\t%s\n", ip, hostname)
		}
	}
	return []byte(b.String())
}

// hostResolvConf is copied into pods that bring no DNS configuration.
const hostResolvConf = "/etc/resolv.conf"

func resolvConf(dns *cri.DNSConfig) ([]byte, error) {
	if len(dns.GetServers())+len(dns.GetSearches())+len(dns.GetOptions()) == 0 {
		b, err := os.ReadFile(hostResolvConf)
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("cannot copy the node's resolv.conf: %w", err)
		}
		if len(b) > 64<<10 {
			return nil, fmt.Errorf("cannot copy the node's %s: it has %d bytes, more than 64 KiB", hostResolvConf, len(b))
		}
		return b, nil
	}
	var b strings.Builder
	if len(dns.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(dns.Searches, " "))
	}
	for _, s := range dns.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(dns.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(dns.Options, " "))
	}
	return []byte(b.String()), nil
}

// clip shortens s for a message.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n] + "…"
}
