//go:build !amd64

package kvm

import "os"

// Executes says that Check lets the processor execute something on this architecture.
const Executes = false

// try cannot do more here: a processor of this architecture needs a set-up of its own.
func try(_, _, _ *os.File) error { return nil }
