package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// metricsSocket, in the base directory, yields the daemon's counters to whoever connects.
	metricsSocket = ".metrics.sock"
	// metricsTimeout bounds how long they may take.
	metricsTimeout = 5 * time.Second
)

// sample is one value of the daemon's counters. Its names in JSON are promised in kuasar-ctl(1).
type sample struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels"`
	Value  float64           `json:"value"`
}

func metrics(c *call, _ *flag.FlagSet) func(context.Context, []string) error {
	return func(ctx context.Context, _ []string) error {
		base, err := c.base()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, metricsTimeout)
		defer cancel()
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", filepath.Join(base, metricsSocket))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
			return fmt.Errorf("no vmm-sandboxer runs on %s: systemctl start kuasar-vmm", base)
		}
		if err != nil {
			return asRoot(fmt.Errorf("cannot ask the daemon for its counters: %w", err))
		}
		defer conn.Close()
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		defer stop()
		text, err := io.ReadAll(io.LimitReader(conn, 16<<20))
		if err != nil {
			return fmt.Errorf("cannot read the daemon's counters: %w", err)
		}
		if !c.json() {
			_, err := c.out.Write(text)
			return err
		}
		samples, err := parseMetrics(string(text))
		if err != nil {
			return err
		}
		return c.print(samples)
	}
}

// parseMetrics reads Prometheus' text format as far as the daemon uses it.
func parseMetrics(text string) ([]sample, error) {
	samples := []sample{}
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		at := strings.LastIndexByte(line, ' ')
		if at < 0 {
			return nil, fmt.Errorf("cannot understand the counter %q", line)
		}
		value, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("cannot understand the counter %q: %w", line, err)
		}
		name, rest, labelled := strings.Cut(line[:at], "{")
		s := sample{Name: name, Labels: map[string]string{}, Value: value}
		for labelled && rest != "" && rest != "}" {
			key, after, found := strings.Cut(rest, "=")
			quoted, err := strconv.QuotedPrefix(after)
			if !found || err != nil {
				return nil, fmt.Errorf("cannot understand the counter %q", line)
			}
			if s.Labels[key], err = strconv.Unquote(quoted); err != nil {
				return nil, fmt.Errorf("cannot understand the counter %q: %w", line, err)
			}
			rest = strings.TrimPrefix(after[len(quoted):], ",")
		}
		samples = append(samples, s)
	}
	return samples, nil
}
