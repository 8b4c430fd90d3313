//go:build mage

package main

import (
	"cmp"
	"context"
	"os"
	"syscall"

	"kuasar.io/kuasar/ci/bed"
	"kuasar.io/kuasar/ci/build"
	"kuasar.io/kuasar/ci/generate"
	"kuasar.io/kuasar/ci/lint"
	"kuasar.io/kuasar/rpm/release"
)

// Default is what "go tool mage" does without a target.
var Default = Build

// ARCH is the architecture to build for, this machine's if it is not set; VERSION takes the place of
// the one that git tells.
var tree = build.Tree{Arch: os.Getenv("ARCH"), Version: os.Getenv("VERSION"), Progress: os.Stdout}

// What is built and cached has the usual modes, whoever asks for it.
func init() { syscall.Umask(0o022) }

// Build makes everything below out/: the programs, the guest kernel and the initrd.
func Build(ctx context.Context) error { return tree.Everything(ctx) }

// Kernel makes the guest kernel, from KERNEL_SOURCE or the distribution's source package.
func Kernel(ctx context.Context) error { return tree.Kernel(ctx) }

// Initrd makes the guest's agent and the initrd around it.
func Initrd(ctx context.Context) error { return tree.Initrd(ctx) }

// Image makes out/kuasar-erofs.img, or with IMAGE=ext4 out/kuasar-ext4.img: the initrd's content as a
// read-only disk, for hypervisor.image_path.
func Image(ctx context.Context) error {
	return tree.Image(ctx, cmp.Or(os.Getenv("IMAGE"), "erofs"))
}

// Package makes out/rpm/kuasar-<version>-<release>.<arch>.rpm, signed with RPM_SIGNING_KEY if it is set.
func Package(ctx context.Context) error { return release.Package(ctx, tree, os.Stdout) }

// Repo makes what is in out/rpm a repository, and shows how to install from it.
func Repo(ctx context.Context) error { return release.Repo(ctx, tree, os.Stdout) }

// Demo runs the guide's pod in a virtual machine and shows it; KEEP=1 leaves it running.
func Demo(ctx context.Context) error { return bed.Demo(ctx, tree) }

// Test runs the unit tests and, on real virtual machines, the end-to-end tests.
func Test(ctx context.Context) error { return bed.Test(ctx, tree) }

// Node tries the package on a node in a virtual machine of its own, with KVM and vsock; STRATOVIRT,
// VIRTIOFSD and ISULAD_ROOT name programs that are to be tried there too.
func Node(ctx context.Context) error { return bed.Node(ctx, tree) }

// Bench measures time and memory and prints them beside what they must reach.
func Bench(ctx context.Context) error { return bed.Bench(ctx, tree) }

// Lint checks format, vet, staticcheck, known vulnerabilities and go.mod of every module.
func Lint(ctx context.Context) error { return lint.Run(ctx, ".", os.Stdout) }

// Generate writes the Go code of the .proto files.
func Generate(ctx context.Context) error { return generate.Write(ctx, ".") }

// Clean removes out/ and keeps the cache.
func Clean() error { return tree.Clean() }
