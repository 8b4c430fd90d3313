//go:build mage

package main

import (
	"context"
	"os"

	"kuasar.io/kuasar/ci/generate"
	"kuasar.io/kuasar/guest/kernel"
)

// Kernel builds the guest kernel, out/vmlinux.bin, from KERNEL_SOURCE or the distribution's source package.
func Kernel(ctx context.Context) error {
	_, err := kernel.Build(ctx, kernel.Config{Source: os.Getenv("KERNEL_SOURCE"), Output: "out/vmlinux.bin", Progress: os.Stdout})
	return err
}

// Generate writes the Go code of the .proto files.
func Generate(ctx context.Context) error { return generate.Write(ctx, ".") }
