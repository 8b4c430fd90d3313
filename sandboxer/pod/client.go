package pod

import (
	"fmt"
	"path/filepath"
	"strings"

	"kuasar.io/kuasar/guest/protocol"
)

// Client is the kind of a pod's client, as far as kinds differ in how they reach the task API and make
// containers. It does not change in a pod's life.
type Client string

// The kinds of clients. The zero value is containerd's, which announces nothing.
const (
	Containerd Client = ""
	ISulad213  Client = "iSulad 2.1.3" // to 2.1.5
	ISulad216  Client = "iSulad 2.1.6" // and later
)

// Announces says that the client announces containers and processes before it makes them.
func (c Client) Announces() bool { return c == ISulad213 || c == ISulad216 }

// String names the client for people.
func (c Client) String() string {
	switch c {
	case Containerd:
		return "containerd"
	case ISulad213:
		return "iSulad 2.1.3 to 2.1.5"
	case ISulad216:
		return "iSulad >= 2.1.6"
	}
	return string(c)
}

// The forms of the task address that iSulad's pods can get; see Options.ISuladAddress.
const (
	AddressAuto       = "auto"
	AddressVsock      = "vsock"
	AddressTTRPCVsock = "ttrpc+vsock"
	AddressUnix       = "unix"
)

// taskVersion is the version of the task API that a client finds at its address.
func (c Client) taskVersion() uint32 {
	if c.Announces() {
		return 2 // it knows no other
	}
	return 3
}

// addressLocked is where the pod's client finds the task API, in a form that the client understands. It
// is the same for the machine's life, over restarts of the daemon, too: clients keep it with every
// container. The caller holds p.mu.
//
// iSulad up to 2.1.5 knows vsock://, later versions know ttrpc+vsock:// only, and all of them know
// unix://. Over vsock they reach the agent itself, so that no daemon can get in the way.
func (p *Pod) addressLocked() string {
	if p.rec.Address != "" {
		return p.rec.Address
	}
	path := filepath.Join(p.dir, taskSocket)
	if !p.rec.Client.Announces() {
		return "ttrpc+unix://" + path
	}
	form := p.m.opts.ISuladAddress
	if form == "" || form == AddressAuto {
		form = AddressVsock
		if p.rec.Client == ISulad216 {
			form = AddressTTRPCVsock
		}
	}
	if form == AddressUnix || p.guest == nil || p.machine == nil {
		return "unix://" + path
	}
	cid := p.machine.Endpoint().VsockCID
	if cid == 0 || !p.guest.Has(protocol.FeatureDirect) {
		return "unix://" + path
	}
	return fmt.Sprintf("%s://%d:%d", form, cid, protocol.PortTask)
}

// direct says that an address leads to the guest itself.
func direct(address string) bool {
	return strings.HasPrefix(address, AddressVsock+"://") || strings.HasPrefix(address, AddressTTRPCVsock+"://")
}
