package kvm

import (
	"os"
	"strings"
	"testing"
	"time"
)

// TestCheck: the answer comes in time, and says what to do if it is no.
func TestCheck(t *testing.T) {
	begin := time.Now()
	err := Check()
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
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
