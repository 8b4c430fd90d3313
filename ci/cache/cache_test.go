package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestEntryIsMadeOnce(t *testing.T) {
	dir := t.TempDir()
	var made atomic.Int32
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			got, err := entry(t.Context(), dir, "k", func(dir, scratch string) error {
				made.Add(1)
				put(t, filepath.Join(scratch, "left"), "x")
				put(t, filepath.Join(dir, "f"), "content")
				return nil
			})
			if err != nil {
				t.Error(err)
				return
			}
			if data, err := os.ReadFile(filepath.Join(got, "f")); err != nil || string(data) != "content" {
				t.Errorf("got %q, %v", data, err)
			}
		})
	}
	group.Wait()
	if made.Load() != 1 {
		t.Errorf("made %d times", made.Load())
	}
	names(t, dir, ".lock", "k")
}

func names(t *testing.T, dir string, want ...string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range list {
		got = append(got, e.Name())
	}
	if len(got) != len(want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
}

func TestFailedEntryLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	failure := errors.New("no compiler")
	_, err := entry(t.Context(), dir, "k", func(dir, _ string) error {
		put(t, filepath.Join(dir, "f"), "half")
		return failure
	})
	if !errors.Is(err, failure) {
		t.Fatalf("got %v", err)
	}
	names(t, dir, ".lock")
}

func TestKilledBuildIsSwept(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, unfinished+"1", "entry"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := entry(t.Context(), dir, "k", func(string, string) error { return nil }); err != nil {
		t.Fatal(err)
	}
	names(t, dir, ".lock", "k")
}

func TestLeastRecentlyUsedGoesFirst(t *testing.T) {
	dir := t.TempDir()
	nothing := func(string, string) error { return nil }
	for i := range kept {
		path, err := entry(t.Context(), dir, strconv.Itoa(i), nothing)
		if err != nil {
			t.Fatal(err)
		}
		then := time.Now().Add(time.Duration(i-100) * time.Hour)
		if err := os.Chtimes(path, then, then); err != nil {
			t.Fatal(err)
		}
	}
	// Using an entry makes it the youngest.
	if _, err := entry(t.Context(), dir, "0", nothing); err != nil {
		t.Fatal(err)
	}
	if _, err := entry(t.Context(), dir, "new", nothing); err != nil {
		t.Fatal(err)
	}
	names(t, dir, ".lock", "0", "2", "3", "4", "5", "new")
}

func TestLockIsLeftWhenTheCallerGivesUp(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lock(ctx, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	unlock()
	again, err := lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	again()
}

func TestKey(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	put(t, file, "one")
	sum := func(k *Key) string {
		s, err := k.Sum()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	same := sum(NewKey(1).Add("a", "b").AddFile("f", file))
	if got := sum(NewKey(1).Add("a", "b").AddFile("f", file)); got != same {
		t.Error("the same inputs have two keys")
	}
	seen := map[string]string{same: "the first"}
	differ := func(what string, k *Key) {
		s := sum(k)
		if other, ok := seen[s]; ok {
			t.Errorf("%s has the key of %s", what, other)
		}
		seen[s] = what
	}
	differ("another format", NewKey(2).Add("a", "b").AddFile("f", file))
	differ("a shifted value", NewKey(1).Add("ab", "").AddFile("f", file))
	put(t, file, "two")
	differ("another content", NewKey(1).Add("a", "b").AddFile("f", file))
	differ("a tree", NewKey(1).AddTree("t", dir))
	put(t, filepath.Join(dir, "g"), "")
	differ("a tree with one more file", NewKey(1).AddTree("t", dir))
	if err := os.Symlink("f", filepath.Join(dir, "l")); err != nil {
		t.Fatal(err)
	}
	differ("a tree with a link", NewKey(1).AddTree("t", dir))
	if _, err := NewKey(1).AddFile("f", filepath.Join(dir, "missing")).Sum(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

func TestPublish(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "out", "to")
	put(t, from, "one")
	if err := Publish(from, to, 0o755); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(to)
	if err != nil {
		t.Fatal(err)
	}
	if before.Mode().Perm() != 0o755 {
		t.Errorf("mode %v", before.Mode())
	}
	if err := Publish(from, to, 0o755); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(to); err != nil || !os.SameFile(before, after) {
		t.Errorf("the same content was written again (%v)", err)
	}
	put(t, from, "two")
	if err := Publish(from, to, 0o755); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(to); err != nil || string(data) != "two" {
		t.Errorf("got %q, %v", data, err)
	}
	names(t, filepath.Join(dir, "out"), "to")
}
