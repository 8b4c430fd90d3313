package nested

import (
	"os"
	"testing"
)

// What runs on the node.
func TestOnNode(t *testing.T) {
	if os.Getenv("KUASAR_NODE") == "" {
		t.Skip("runs on a node that TestNode boots")
	}
	n := &onNode{t: t}
	n.show("uname -a; ls -l /dev/kvm /dev/vhost-vsock /dev/vhost-net /dev/net/tun; lsmod; systemd-analyze; systemd-analyze blame --no-pager | head -n 15")
}
