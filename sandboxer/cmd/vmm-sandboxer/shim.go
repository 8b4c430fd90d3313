package main

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"

	"kuasar.io/kuasar/guest/protocol/version"
)

// containerd from 2.4 on wants an executable for every runtime type, also where a sandboxer serves
// the pods: io.containerd.vmm.v1 is containerd-shim-vmm-v1. It is asked what it is, and after the
// end of each container it is called to clean up. It never has to start anything, and the daemon
// cleans up by itself.

// isShim tells whether the program was called by such a name.
func isShim(name string) bool { return strings.HasPrefix(filepath.Base(name), "containerd-shim-") }

func shim(args []string, stdout, stderr io.Writer) int {
	var reply proto.Message
	switch {
	case slices.Contains(args, "-info"), slices.Contains(args, "--info"):
		reply = &types.RuntimeInfo{
			Name:    "io.containerd.vmm.v1",
			Version: &types.RuntimeVersion{Version: version.Version, Revision: version.Commit},
		}
	case slices.Contains(args, "-v"), slices.Contains(args, "-version"), slices.Contains(args, "--version"):
		fmt.Fprintln(stdout, "vmm-sandboxer", version.String())
		return 0
	case len(args) > 0 && args[len(args)-1] == "delete":
		reply = &taskv3.DeleteResponse{}
	case len(args) > 0 && args[len(args)-1] == "start":
		fmt.Fprintln(stderr, "this runtime starts no shims: its pods are served by vmm-sandboxer. "+
			"In containerd's configuration, set sandboxer = \"vmm\" for the runtime, add the proxy plugin vmm of type sandbox, "+
			"and see that the daemon runs (systemctl status kuasar-vmm)")
		return 1
	default:
		fmt.Fprintln(stderr, "under this name the program serves containerd only: -info and delete")
		return 2
	}
	b, err := proto.Marshal(reply)
	if err == nil {
		_, err = stdout.Write(b)
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}
