package vmtest

import (
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// CommandLine is what QEMU was told on its command line.
type CommandLine struct {
	// Options are those that occur once, without their dash: name, machine, append, ...
	Options map[string]string
	// Listening are the chardevs that listen on an inherited descriptor.
	Listening map[string]int
	// RootPorts are the ids of the slots for hot-plugged devices.
	RootPorts map[string]bool
	// SCSI says that there is a controller with the bus scsi0.0.
	SCSI bool
	// Devices are the other devices: each with its driver under "driver".
	Devices []map[string]string
	// Netdevs and Objects by their ids, with what they are under "type".
	Netdevs, Objects map[string]map[string]string

	fds      map[int]string  // referenced descriptors and by what
	referred map[string]bool // what was defined and is used: "chardev:x"
	defined  []string
}

// once are the options with a value that must occur exactly once, and the values that they may have.
var once = map[string]*regexp.Regexp{
	"name":    regexp.MustCompile(`^sandbox-[A-Za-z0-9][A-Za-z0-9_.-]*$`),
	"machine": regexp.MustCompile(`^(q35|virt)(,.*)?$`),
	"accel":   regexp.MustCompile(`^(kvm|tcg,thread=multi,tb-size=\d+)$`),
	"cpu":     regexp.MustCompile(`^(host|max)$`),
	"smp":     regexp.MustCompile(`^[1-9]\d*$`),
	"m":       regexp.MustCompile(`^[1-9]\d*M$`),
	"display": regexp.MustCompile(`^none$`),
	"sandbox": regexp.MustCompile(`^on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny$`),
	"kernel":  regexp.MustCompile(`^/`),
	"append":  regexp.MustCompile(`\bconsole=tty`),
	"serial":  regexp.MustCompile(`^chardev:`),
	"mon":     regexp.MustCompile(`^chardev=[a-z]+,mode=control$`),
}

// atMostOnce are those that may be missing.
var atMostOnce = map[string]*regexp.Regexp{
	"initrd": regexp.MustCompile(`^/`),
	"bios":   regexp.MustCompile(`^qboot\.rom$`),
}

// bare are the options without a value that must be there.
var bare = []string{"nodefaults", "no-user-config", "no-reboot"}

// drivers are the devices and their properties.
var drivers = map[string][]string{
	"virtio-rng-pci":    {"rng"},
	"virtio-serial-pci": {"max_ports"},
	"virtserialport":    {"chardev", "name", "nr"},
	"vhost-vsock-pci":   {"id", "guest-cid", "vhostfd"},
	"virtio-scsi-pci":   {"id"},
	"vhost-user-fs-pci": {"chardev", "tag", "queue-size"},
	"virtio-9p-pci":     {"fsdev", "mount_tag"},
	"virtio-net-pci":    {"id", "netdev", "mac", "romfile", "host_mtu"},
	"virtio-blk-pci":    {"drive"},
	"pcie-root-port":    {"id", "bus", "chassis", "slot", "addr", "multifunction"},
}

// ParseCommandLine understands the options that the driver may use and refuses everything else:
// unknown options and properties, references to what is not there, things that nothing refers to.
func ParseCommandLine(args []string) (*CommandLine, error) {
	c := &CommandLine{
		Options: map[string]string{}, Listening: map[string]int{}, RootPorts: map[string]bool{},
		Netdevs: map[string]map[string]string{}, Objects: map[string]map[string]string{},
		fds: map[int]string{}, referred: map[string]bool{},
	}
	for i := 0; i < len(args); i++ {
		name, ok := strings.CutPrefix(args[i], "-")
		if !ok {
			return nil, fmt.Errorf("%s: not an option", args[i])
		}
		if slices.Contains(bare, name) {
			c.Options[name] = "on"
			continue
		}
		if i++; i == len(args) {
			return nil, fmt.Errorf("-%s: requires an argument", name)
		}
		if err := c.option(name, args[i]); err != nil {
			return nil, fmt.Errorf("-%s %s: %w", name, args[i], err)
		}
	}
	return c, c.complete()
}

func (c *CommandLine) option(name, value string) error {
	re := once[name]
	if re == nil {
		re = atMostOnce[name]
	}
	if re != nil {
		if _, twice := c.Options[name]; twice {
			return fmt.Errorf("given twice")
		}
		if !re.MatchString(value) {
			return fmt.Errorf("not a value of this option")
		}
		c.Options[name] = value
		switch name {
		case "kernel", "initrd":
			_, err := os.Stat(value)
			return err
		case "serial":
			c.referred["chardev:"+strings.TrimPrefix(value, "chardev:")] = true
		case "mon":
			c.referred["chardev:"+keys(value)["chardev"]] = true
		case "machine":
			if backend := keys(value)["memory-backend"]; backend != "" {
				c.referred["object:"+backend] = true
			}
		}
		return nil
	}
	kv := keys(value)
	switch name {
	case "chardev":
		return c.chardev(kv)
	case "object":
		allowed := map[string][]string{
			"rng-builtin":          {"id"},
			"memory-backend-memfd": {"id", "size", "share", "prealloc"},
			"memory-backend-ram":   {"id", "size", "prealloc"},
		}[kv["type"]]
		if allowed == nil {
			return fmt.Errorf("unknown object type")
		}
		c.Objects[kv["id"]] = kv
		c.define("object", kv["id"])
		return known(kv, allowed)
	case "netdev":
		c.Netdevs[kv["id"]] = kv
		c.define("netdev", kv["id"])
		if kv["type"] != "tap" {
			return fmt.Errorf("not a tap")
		}
		if err := c.fd(kv["fd"], "netdev "+kv["id"]); err != nil {
			return err
		}
		return known(kv, []string{"id", "fd", "vhost"})
	case "fsdev":
		c.define("fsdev", kv["id"])
		if kv["type"] != "local" || kv["security_model"] != "none" || kv["multidevs"] != "remap" {
			return fmt.Errorf("not the wanted kind of export")
		}
		if fi, err := os.Stat(kv["path"]); err != nil || !fi.IsDir() {
			return fmt.Errorf("no directory")
		}
		return known(kv, []string{"id", "security_model", "multidevs", "path"})
	case "blockdev":
		c.define("drive", kv["node-name"])
		if kv["read-only"] != "on" {
			return fmt.Errorf("the image is shared by all pods and must be read-only")
		}
		_, err := os.Stat(kv["file.filename"])
		return err
	case "device":
		return c.device(kv)
	}
	return fmt.Errorf("invalid option")
}

func (c *CommandLine) chardev(kv map[string]string) error {
	c.define("chardev", kv["id"])
	if kv["type"] != "socket" {
		return fmt.Errorf("not a socket")
	}
	if kv["server"] != "on" {
		if fi, err := os.Stat(kv["path"]); err != nil || fi.Mode().Type() != os.ModeSocket {
			return fmt.Errorf("no socket there")
		}
		return known(kv, []string{"id", "path"})
	}
	if kv["wait"] != "off" {
		return fmt.Errorf("would wait for a client")
	}
	if err := c.fd(kv["fd"], "chardev "+kv["id"]); err != nil {
		return err
	}
	fd, _ := strconv.Atoi(kv["fd"])
	if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on != 1 {
		return fmt.Errorf("descriptor %d does not listen", fd)
	}
	c.Listening[kv["id"]] = fd
	return known(kv, []string{"id", "fd", "server", "wait"})
}

func (c *CommandLine) device(kv map[string]string) error {
	driver := kv["type"]
	properties := drivers[driver]
	if properties == nil {
		return fmt.Errorf("'%s' is not a valid device model name", driver)
	}
	if err := known(kv, properties); err != nil {
		return err
	}
	for property, kind := range map[string]string{"chardev": "chardev", "netdev": "netdev", "fsdev": "fsdev", "rng": "object", "drive": "drive"} {
		if id, ok := kv[property]; ok {
			if c.referred[kind+":"+id] {
				return fmt.Errorf("%s %s is in use", kind, id)
			}
			c.referred[kind+":"+id] = true
		}
	}
	switch driver {
	case "pcie-root-port":
		if c.RootPorts[kv["id"]] || kv["bus"] != "pcie.0" {
			return fmt.Errorf("duplicate id or wrong bus")
		}
		c.RootPorts[kv["id"]] = true
		return nil
	case "virtio-scsi-pci":
		if c.SCSI || kv["id"] != "scsi0" {
			return fmt.Errorf("not the one controller")
		}
		c.SCSI = true
	case "vhost-vsock-pci":
		if err := c.fd(kv["vhostfd"], driver); err != nil {
			return err
		}
	case "virtio-net-pci":
		if _, err := net.ParseMAC(kv["mac"]); err != nil {
			return err
		}
		if rom, ok := kv["romfile"]; !ok || rom != "" {
			return fmt.Errorf("would load a boot ROM")
		}
	case "virtserialport":
		if kv["nr"] == "0" {
			return fmt.Errorf("port 0 is reserved for consoles")
		}
	}
	kv["driver"] = driver
	c.Devices = append(c.Devices, kv)
	return nil
}

func (c *CommandLine) define(kind, id string) { c.defined = append(c.defined, kind+":"+id) }

func (c *CommandLine) fd(value, user string) error {
	fd, err := strconv.Atoi(value)
	if err != nil {
		return fmt.Errorf("no descriptor: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
		return fmt.Errorf("descriptor %d: %w", fd, err)
	}
	if other, taken := c.fds[fd]; taken {
		return fmt.Errorf("descriptor %d is also that of %s", fd, other)
	}
	c.fds[fd] = user
	return nil
}

// complete checks what can only be checked at the end.
func (c *CommandLine) complete() error {
	for _, name := range bare {
		if c.Options[name] == "" {
			return fmt.Errorf("-%s is missing", name)
		}
	}
	for name := range once {
		if c.Options[name] == "" {
			return fmt.Errorf("-%s is missing", name)
		}
	}
	seen := map[string]bool{}
	for _, thing := range c.defined {
		if seen[thing] {
			return fmt.Errorf("duplicate %s", thing)
		}
		seen[thing] = true
		if !c.referred[thing] {
			return fmt.Errorf("nothing uses %s", thing)
		}
	}
	for thing := range c.referred {
		if !seen[thing] {
			return fmt.Errorf("there is no %s", thing)
		}
	}
	for _, d := range c.Devices {
		if d["driver"] != "vhost-user-fs-pci" {
			continue
		}
		if m := c.Objects[keys(c.Options["machine"])["memory-backend"]]; m == nil || m["share"] != "on" || m["size"] != c.Options["m"] {
			return fmt.Errorf("vhost-user-fs needs the guest's memory shared")
		}
	}
	return nil
}

// checkFDs refuses descriptors that were inherited and are not mentioned: they would be leaks.
func (c *CommandLine) checkFDs(inherited map[int]bool) error {
	for fd := range inherited {
		if _, ok := c.fds[fd]; !ok {
			target, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			return fmt.Errorf("descriptor %d (%s) was inherited for nothing", fd, target)
		}
	}
	return nil
}

// keys splits "type,key=value,..." at commas that are not doubled. What has no key is the type.
func keys(value string) map[string]string {
	const comma = "\x00"
	kv := make(map[string]string)
	for i, part := range strings.Split(strings.ReplaceAll(value, ",,", comma), ",") {
		part = strings.ReplaceAll(part, comma, ",")
		key, v, ok := strings.Cut(part, "=")
		if i == 0 && !ok {
			key, v = "type", part
		}
		kv[key] = v
	}
	if t, ok := kv["qom-type"]; ok {
		kv["type"] = t
	}
	return kv
}

func known(kv map[string]string, properties []string) error {
	for key := range kv {
		if key != "type" && key != "driver" && !slices.Contains(properties, key) {
			return verbatim("Property '%s' not found", key)
		}
	}
	return nil
}

// verbatim is an error in QEMU's own words, which do not follow the conventions of Go.
func verbatim(format string, args ...any) error { return words(fmt.Sprintf(format, args...)) }

type words string

func (w words) Error() string { return string(w) }
