package containers

import (
	"os"
	"testing"

	"kuasar.io/kuasar/guest/agent/namespaces"
)

// TestMain gives the test binary the second lives of the agent's binary.
func TestMain(m *testing.M) {
	if IsInit() {
		Init()
	}
	if len(os.Args) > 1 && os.Args[1] == namespaces.PauseArg {
		namespaces.Pause()
	}
	os.Exit(m.Run())
}
