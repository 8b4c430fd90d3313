//go:build mage

package main

import (
	"context"

	"kuasar.io/kuasar/ci/generate"
)

// Generate writes the Go code of the .proto files.
func Generate(ctx context.Context) error { return generate.Write(ctx, ".") }
