package nested

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/cri"
	"kuasar.io/kuasar/ci/e2e/image"
)

// given says whether a program was given to the node, and if not, by what it is. The transcript then says
// that it was not tried.
func (n *guide) given(name, variable, what string) bool {
	if _, err := os.Stat(filepath.Join("/node/given", name)); err == nil {
		return true
	}
	fmt.Printf("\n======== Not tried: %s itself, as none was given; %s=<path> does\n", what, variable)
	return false
}

// stratovirt puts what was given where openEuler's packages have it. The configuration is the package's own.
func (n *guide) stratovirt() {
	n.show("install -m 0755 /node/given/stratovirt /usr/bin/stratovirt && stratovirt -version")
	n.try("[ ! -e /node/given/virtiofsd ] || install -D -m 0755 /node/given/virtiofsd /usr/libexec/virtiofsd")
	n.try("[ ! -d /node/given/firmware ] || { mkdir -p /usr/share/edk2/ovmf && cp /node/given/firmware/*.fd /usr/share/edk2/ovmf/; }")
	n.use(stratovirtConfig)
}

// iSuladSocket is where iSulad serves CRI, as the guide's crictl.yaml has it.
const iSuladSocket = "/var/run/isulad.sock"

// realISulad lays the installed tree over the node, configures it as the guide does, and runs the guide's
// pod through it.
func (n *guide) realISulad() {
	n.show("for dir in usr etc lib lib64; do [ ! -d /node/given/isulad/$dir ] || cp -a --no-clobber /node/given/isulad/$dir/. /$dir/; done; ldconfig")
	n.show("isulad --version")
	n.show("mkdir -p /etc/isulad && { [ -e /etc/isulad/daemon.json ] || echo '{}' >/etc/isulad/daemon.json; }")
	n.show("kuasar-ctl setup isulad")
	n.show("cat /etc/isulad/daemon.json")
	// A tree that was installed by "make install" may have no unit.
	if output, _ := n.quietly("systemctl cat isulad.service", discard{}); strings.Contains(output, "[Service]") {
		n.show("systemctl daemon-reload && systemctl restart isulad && systemctl status --no-pager --lines=5 isulad")
	} else {
		n.show("systemd-run --unit=isulad isulad")
	}
	client, err := cri.Dial(iSuladSocket)
	if err != nil {
		n.t.Fatal(err)
	}
	defer client.Close()
	n.eventually("iSulad answers", func() bool {
		_, err := client.Runtime.Version(n.ctx, &runtimeapi.VersionRequest{})
		return err == nil
	})
	busybox, err := image.Busybox()
	if err != nil {
		n.t.Fatal(err)
	}
	archive, err := busybox.Archive()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile("/run/busybox.tar", archive, 0o600); err != nil {
		n.t.Fatal(err)
	}
	n.show("isula load --input /run/busybox.tar")

	engine := n.cri
	defer func() { n.cri = engine }()
	n.cri = client
	p := n.run("busybox-isulad")
	n.list(1)
	p.cid = n.cid(p)
	n.exec(p)
	began := time.Now()
	n.eventually("the container's log is not empty", func() bool { return n.ask("cat "+p.log) != "" })
	fmt.Printf("(the log was there after %.1f s)\n", time.Since(began).Seconds())
	n.show("tail -n 3 " + p.log)
	n.show("ls -al " + state + "/" + p.id + "/")
	n.pods = []*guidePod{p}
	n.remove()
	n.show("systemctl stop isulad")
}
