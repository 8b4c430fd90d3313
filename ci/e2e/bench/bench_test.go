package main

import (
	"math"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, test := range []struct {
		samples []float64
		want    float64
	}{{[]float64{3, 1, 2}, 2}, {[]float64{4, 1, 3, 2}, 2.5}, {[]float64{7}, 7}} {
		if got := median(test.samples); got != test.want {
			t.Errorf("the median of %v is %v, not %v", test.samples, got, test.want)
		}
	}
}

func TestSlope(t *testing.T) {
	if got := slope([]float64{1, 5, 10}, []float64{120, 200, 300}); math.Abs(got-20) > 1e-9 {
		t.Errorf("the slope is %v, not 20", got)
	}
}
