package metrics

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestExposition(t *testing.T) {
	var r Registry
	r.Stage("agent hello", 700*time.Millisecond, nil)
	r.Stage("agent hello", time.Second, nil)
	r.Stage("agent hello", time.Minute, nil)
	r.Stage("network", time.Millisecond, errors.New("no tap"))
	r.Recovered("adopted")
	var b strings.Builder
	if _, err := r.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`kuasar_boot_stage_seconds_bucket{stage="agent hello",le="0.5"} 0`,
		`kuasar_boot_stage_seconds_bucket{stage="agent hello",le="1"} 2`,
		`kuasar_boot_stage_seconds_bucket{stage="agent hello",le="10"} 2`,
		`kuasar_boot_stage_seconds_bucket{stage="agent hello",le="+Inf"} 3`,
		`kuasar_boot_stage_seconds_sum{stage="agent hello"} 61.7`,
		`kuasar_boot_stage_seconds_count{stage="agent hello"} 3`,
		`kuasar_boot_failures_total{stage="network"} 1`,
		`kuasar_recovered_pods_total{outcome="adopted"} 1`,
	} {
		if !strings.Contains(b.String(), want+"\n") {
			t.Errorf("no line %s in\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), `stage_seconds_count{stage="network"}`) {
		t.Error("a failed stage was counted as one that took its time")
	}
}
