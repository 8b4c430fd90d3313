package kvm

import (
	"os"
	"strings"
	"testing"
)

// TestCheck: there is an answer, and it says what to do if it is no.
func TestCheck(t *testing.T) {
	err := Check()
	t.Log(err)
	if _, serr := os.Stat(Device); serr != nil {
		if err == nil || !strings.Contains(err.Error(), "enable virtualization") {
			t.Errorf("without a device: %v", err)
		}
	}
	if err != nil && !strings.Contains(err.Error(), Device) {
		t.Errorf("it does not say what about: %v", err)
	}
}
