package qemu

import "kuasar.io/kuasar/sandboxer/vm"

// DropMonitor closes the machine's connections to QEMU, as the end of its daemon does.
func DropMonitor(machine vm.Machine) {
	m := machine.(*Machine)
	m.mu.Lock()
	client, console := m.client, m.console
	m.mu.Unlock()
	client.Close()
	console.conn.Close()
}
