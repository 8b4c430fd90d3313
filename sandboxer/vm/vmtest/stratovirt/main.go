// Stratovirt is a StratoVirt that boots its guests on QEMU's emulation, for tests of a whole node on
// machines without KVM. It takes the command line and the monitor's requests of the version that its name
// ends with, as in stratovirt-2.4.0, and refuses what that version refuses; what is then done, QEMU does.
// A configuration must ask for it with accelerator = "tcg".
package main

import (
	"fmt"
	"os"

	"kuasar.io/kuasar/sandboxer/vm/vmtest"
)

func main() {
	status, err := vmtest.StratoVirtOnQEMU(os.Args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "Error: %v\n", err)
		status = max(status, 1)
	}
	os.Exit(status)
}
