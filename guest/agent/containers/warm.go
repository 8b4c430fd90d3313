package containers

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/cgroups"
	devices "github.com/opencontainers/cgroups/devices/config"
)

// Warm does in advance what the first container would have to wait for, and what every container
// would that is alone in the guest: with cgroup v2 the kernel patches its own code when the first
// program that filters devices is attached and when the last one goes, which takes an emulated
// processor some 100 ms. A program that allows everything, on the parent of all containers, keeps
// the filter switched on; the containers' own ones decide as before. It is best called in the
// background once the guest has told the host that it is ready.
//
// A failure is logged and otherwise of no consequence.
func (s *Service) Warm() {
	if !cgroups.IsCgroup2UnifiedMode() {
		return
	}
	if err := warm(filepath.Join("/sys/fs/cgroup", s.cgroup)); err != nil {
		s.log.Warn("the first container will take longer to create", "err", err)
	}
}

func warm(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
		return err
	}
	controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	if names := strings.Fields(string(controllers)); len(names) > 0 {
		delegated := "+" + strings.Join(names, " +")
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(delegated), 0); err != nil {
			return err
		}
	}
	everything := &devices.Rule{
		Type: devices.WildcardDevice, Major: devices.Wildcard, Minor: devices.Wildcard, Permissions: "rwm", Allow: true,
	}
	return cgroups.DevicesSetV2(dir, &cgroups.Resources{Devices: []*devices.Rule{everything}})
}
