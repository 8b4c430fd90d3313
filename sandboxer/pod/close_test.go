package pod

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestCloseHandsOver(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	m := NewManager(o)
	mustStart(t, m, "a")
	c := w.get("containers", "a").(*fakeContainers)
	journal := journalOf(t, o.Dir)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	waited := make(chan error, 1)
	go func() {
		_, err := m.Wait(ctx, "a")
		waited <- err
	}()
	m.Close()
	c.mu.Lock()
	handedOver := c.handedOver
	c.mu.Unlock()
	if !handedOver || w.get("containers", "a") == nil {
		t.Error("the containers were not handed over, or forgotten")
	}
	if _, err := os.Lstat(filepath.Join(o.Dir, "a", taskSocket)); err != nil {
		t.Error(err)
	}
	// What happens to the pod from now on is the next daemon's to see.
	w.machine("a").end(1, "qemu: internal error")
	c.c.Fail(errors.New("an over-long frame"))
	m.find("a").fail(errShareLost)
	if undone := w.undone(); len(undone) > 0 {
		t.Errorf("undone: %q", undone)
	}
	if got := journalOf(t, o.Dir); got != journal {
		t.Errorf("the journal was written: %s", got)
	}
	select {
	case err := <-waited:
		t.Errorf("a Wait ended although the pod lives: %v", err)
	default:
	}
	cancel()
	if err := <-waited; !errors.Is(err, context.Canceled) {
		t.Errorf("wait: %v", err)
	}
}

func TestCloseDuringBoots(t *testing.T) {
	for _, stage := range []string{StageCgroup, StageNetwork, StageShare, StageSlot, StageHypervisor, StageHello, StageSetup, StageTask} {
		t.Run(stage, func(t *testing.T) {
			w := newWorld(t)
			o := testOptions(t, w)
			o.BootLimit = time.Minute
			m := NewManager(o)
			closed := make(chan struct{})
			m.afterStage = func(_, s string) {
				if s != stage {
					return
				}
				go func() {
					m.Close()
					close(closed)
				}()
				// The boot goes on at once, or the cancellation comes first: either is a boot given up.
				eventually(t, "the daemon is closing", m.closing.Load)
			}
			if stage == StageHypervisor {
				w.noHello = true // it would hang until the boot is given up
			}
			mustCreate(t, m, "a")
			_, err := m.Start(t.Context(), "a")
			<-closed
			if err == nil {
				// Ready before it was cancelled, so it is a pod like any other.
				if s, err := m.Status("a"); err != nil || s.State != Ready {
					t.Errorf("status %+v, %v", s, err)
				}
				return
			}
			if !errdefs.IsUnavailable(err) || errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "daemon is stopping") {
				t.Errorf("error %v", err)
			}
			checkNothingLeft(t, w, o.Dir)
			if _, err := m.Start(t.Context(), "a"); err == nil {
				t.Error("a closed manager boots")
			}
		})
	}
}

func TestCloseIsBounded(t *testing.T) {
	w := newWorld(t)
	o := testOptions(t, w)
	o.BootLimit = time.Minute
	m := NewManager(o)
	m.closeLimit = 50 * time.Millisecond
	ids := startMany(t, m, 3)
	// One guest never lets go, one pod's end never ends, and a boot cannot be undone in time.
	hang := make(chan struct{})
	c := w.get("containers", ids[0]).(*fakeContainers)
	c.mu.Lock()
	c.hang = hang
	c.mu.Unlock()
	w.noHello = true
	booting, stuck := make(chan struct{}), make(chan struct{})
	m.afterStage = func(id, stage string) {
		if stage == StageHypervisor {
			close(booting)
			<-stuck
		}
	}
	if err := m.Create(t.Context(), CreateRequest{ID: "x", NetNS: netns(50)}); err != nil {
		t.Fatal(err)
	}
	started := make(chan error, 1)
	go func() {
		_, err := m.Start(t.Context(), "x")
		started <- err
	}()
	<-booting
	m.Close()
	// The healthy ones did not pay for it.
	for _, id := range ids[1:] {
		c := w.get("containers", id).(*fakeContainers)
		c.mu.Lock()
		if !c.handedOver {
			t.Errorf("%s was not handed over", id)
		}
		c.mu.Unlock()
	}
	close(hang)
	close(stuck)
	if err := <-started; !errdefs.IsUnavailable(err) {
		t.Errorf("start: %v", err)
	}
}

// A client's Stop and Shutdown, and the daemon's end, at the same time: containers are forgotten or
// handed over, never both.
func TestCloseDuringShutdown(t *testing.T) {
	for range 50 {
		w := newWorld(t)
		o := testOptions(t, w)
		m := NewManager(o)
		mustStart(t, m, "a")
		c := w.get("containers", "a").(*fakeContainers)
		ended := make(chan error, 1)
		go func() { ended <- m.Shutdown(context.Background(), "a") }()
		m.Close()
		err := <-ended
		c.mu.Lock()
		handedOver := c.handedOver
		c.mu.Unlock()
		switch {
		case handedOver && (err == nil || w.get("containers", "a") == nil):
			t.Fatalf("handed over and forgotten: %v", err)
		case !handedOver && err != nil:
			t.Fatalf("neither handed over nor forgotten: %v", err)
		}
		if handedOver && slices.Contains(w.undone(), "guest gone") != (m.find("a").rec.State == Stopped) {
			t.Fatalf("undone %q in state %s", w.undone(), m.find("a").rec.State)
		}
		// Either way the next daemon, or this one, ends what was begun.
		w.dropDaemon()
		m = another(t, o)
		if err := m.Shutdown(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		checkNothingLeft(t, w, o.Dir)
	}
}
