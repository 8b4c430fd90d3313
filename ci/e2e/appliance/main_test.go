// Package appliance installs the appliance's packages as an administrator does: into empty roots with
// dnf, and on a machine with systemd, where it runs pods that must outlive restarts of their daemon,
// upgrades and downgrades.
//
// The tests need root, dnf, debootstrap, QEMU and the repositories that ci/repositories makes of the
// built tree; they run if KUASAR_E2E=1 is in the environment, as "go tool mage test" sets it, and are
// skipped otherwise.
package appliance

import (
	"os"
	"path/filepath"
	"testing"
)

// What ci/repositories has made; it tells about each.
const (
	currentVersion = "1.0.0"
	nextVersion    = "1.1.0"
	remark         = "# What another release has to say.\n"
	publicKey      = "RPM-GPG-KEY-kuasar-tests"
)

// top is the source tree of the project.
func top(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// repository returns the directory of one of the tests' repositories.
func repository(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(top(t), "out", "repositories", name)
	if _, err := os.Stat(filepath.Join(dir, "repodata", "repomd.xml")); err != nil {
		t.Fatalf("there is no repository: %v; \"go tool mage test\" makes it", err)
	}
	return dir
}
