package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"

	"kuasar.io/kuasar/guest/protocol"
)

// Kuasar's own files for StratoVirt and QEMU have more keys than the guide's, or call the same thing
// differently. What has an effect here gets it; the rest is named in one note.

// renamed are keys of such files that mean the same as one of ours.
var renamed = map[string]string{
	"hypervisor.qemu_path":         "hypervisor.path",
	"hypervisor.firmware_path":     "hypervisor.firmware",
	"hypervisor.default_max_vcpus": "hypervisor.max_vcpus",
	"hypervisor.mem_prealloc":      "hypervisor.enable_mem_prealloc",
	"hypervisor.virtiofsd.path":    "hypervisor.virtiofsd_conf.path",
}

// shareFS says how files get into the guest, which is a parameter of the guest's kernel here.
const shareFS = "hypervisor.share_fs"

// idle are keys of such files without effect here. There are three kinds: what the drivers decide
// themselves for every machine, what tunes a device that is not used, and what Kuasar itself does not read.
var idle = []string{
	"sandbox.enable_tracing",
	"hypervisor.cpu_features",
	"hypervisor.cpu_model",
	"hypervisor.default_bridges",
	"hypervisor.disable_nvdimm",
	"hypervisor.enable_iothreads",
	"hypervisor.enable_swap",
	"hypervisor.enable_vhost_user_store",
	"hypervisor.entropy_source",
	"hypervisor.file_backend_mem_path",
	"hypervisor.hugepages",
	"hypervisor.machine_accelerators",
	"hypervisor.mem_offset",
	"hypervisor.mem_slots",
	"hypervisor.memory_path",
	"hypervisor.msize_9p",
	"hypervisor.use_vsock",
	"hypervisor.virtio_9p_direct_io",
	"hypervisor.virtio_9p_multidevs",
	"hypervisor.virtiofs_cache",
	"hypervisor.virtiofs_cache_size",
	"hypervisor.virtiofs_daemon_path",
	"hypervisor.virtiofs_extra_args",
	"hypervisor.virtiofsd.cache",
	"hypervisor.virtiofsd.log_level",
	"hypervisor.virtiofsd.shared_dir",
	"hypervisor.virtiofsd.socket_path",
	"hypervisor.virtiofsd.syslog",
	"hypervisor.virtiofsd.thread_pool_size",
}

// neutral are the only values of idle keys that can be passed over: any other says where the pods' memory
// comes from or what their machine is, and who wrote it relies on that.
var neutral = map[string]struct {
	value any
	why   string
}{
	"hypervisor.hugepages":            {false, "huge pages are not supported, and those that are set aside would lie idle; set it to false"},
	"hypervisor.memory_path":          {"", "pods' memory in a file is not supported; set it to \"\""},
	"hypervisor.machine_accelerators": {"", "further options of the machine are not supported (see hypervisor.accelerator); set it to \"\""},
}

// blockDeviceDrivers are the spellings of block_device_driver in files for QEMU.
var blockDeviceDrivers = map[string]string{"VirtioBlk": BlockVirtioBlk, "VirtioScsi": BlockVirtioSCSI, "VirtioMmio": virtioMMIO}

// virtioMMIO asks for a bus instead of a device: that of the machine type microvm, where every device is on
// it, so that it adds nothing to virtio-blk.
const virtioMMIO = "virtio-mmio"

// qemuPaths is what an empty qemu_path means.
var qemuPaths = map[string]string{"amd64": "/usr/bin/qemu-system-x86_64", "arm64": "/usr/bin/qemu-system-aarch64"}

// translate turns such files' keys in flat into ours. It returns under which name the file has each key
// of ours that it renames, and what is wrong.
func (c *Config) translate(flat map[string]any, arch string, bad func(key, msg string)) (names map[string]string) {
	names = map[string]string{}
	for theirs, ours := range renamed {
		value, ok := flat[theirs]
		if !ok {
			continue
		}
		delete(flat, theirs)
		if own, twice := flat[ours]; twice && !reflect.DeepEqual(own, value) {
			bad(theirs, fmt.Sprintf("it means the same as %s, which has another value (%s); remove one of them", ours, typeName(own)))
			continue
		}
		flat[ours], names[ours] = value, theirs
	}
	// An empty path means the usual one, as there. Which one that is, the key says.
	if flat["hypervisor.path"] == "" {
		delete(flat, "hypervisor.path")
		if qemu := qemuPaths[arch]; qemu != "" && names["hypervisor.path"] != "" {
			c.Hypervisor.Path = qemu
		}
	}
	if flat["sandbox.log_level"] == "" {
		delete(flat, "sandbox.log_level")
	}
	c.translateShare(flat, bad)

	var without []string
	for _, key := range idle {
		value, ok := flat[key]
		if !ok {
			continue
		}
		delete(flat, key)
		if n, ok := neutral[key]; ok && !reflect.DeepEqual(value, n.value) {
			bad(key, n.why)
			continue
		}
		without = append(without, key)
	}
	if len(without) > 0 {
		verb := "has"
		if len(without) > 1 {
			verb = "have"
		}
		slices.Sort(without)
		c.Notes = append(c.Notes, fmt.Sprintf("%s %s no effect here, and may be removed", strings.Join(without, ", "), verb))
	}
	return names
}

// translateShare adds to the kernel's parameters what share_fs says.
func (c *Config) translateShare(flat map[string]any, bad func(key, msg string)) {
	value, ok := flat[shareFS]
	if !ok {
		return
	}
	delete(flat, shareFS)
	var kind string
	switch value {
	case "Virtio9P":
		kind = "9p"
	case "VirtioFS":
		kind = "virtiofs"
	default:
		bad(shareFS, "expected \"VirtioFS\" or \"Virtio9P\", got "+typeName(value))
		return
	}
	params, ok := flat["hypervisor.kernel_params"].(string)
	if !ok {
		if _, set := flat["hypervisor.kernel_params"]; set {
			return // of the wrong type, which is said later
		}
		params = c.Hypervisor.KernelParams
	}
	// The last one counts, for the daemon as for the guest: of the two, the key is what Kuasar's own
	// daemon goes by.
	kept := slices.DeleteFunc(strings.Fields(params), func(p string) bool { return strings.HasPrefix(p, protocol.ParamShareType+"=") })
	flat["hypervisor.kernel_params"] = strings.Join(append(kept, protocol.ParamShareType+"="+kind), " ")
}
