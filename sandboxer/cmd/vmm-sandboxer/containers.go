package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"kuasar.io/kuasar/sandboxer/container"
	"kuasar.io/kuasar/sandboxer/handover"
	"kuasar.io/kuasar/sandboxer/pod"
	"kuasar.io/kuasar/sandboxer/storage"
	"kuasar.io/kuasar/sandboxer/task"
)

// containers joins the set of a pod's containers with the server of its task socket.
type containers struct {
	*container.Set
	server *task.Server
}

var _ container.Guest = (*pod.Guest)(nil)

func newContainers(c pod.ContainersConfig, store *handover.Store) (pod.Containers, error) {
	var records []container.Record
	if c.Records != nil {
		// Before anything is taken over: a daemon that can read them has use for it.
		if err := json.Unmarshal(c.Records, &records); err != nil {
			return nil, fmt.Errorf("%w: cannot decode the containers' records: %w", pod.ErrUnmanageable, err)
		}
	}
	var share container.Storage = noStorage{}
	if s, ok := c.Share.(*storage.Share); ok {
		share = s
	}
	set := container.NewSet(container.Options{
		PodID: c.PodID, Guest: c.Guest, Storage: share, SharedPID: c.SharedPID, Store: store,
		Announced: c.Client.Announces(), Direct: c.Direct,
		Journal: func(records []container.Record) {
			b, err := json.Marshal(records)
			if err != nil {
				c.Log.Error("cannot encode the containers' records", "error", err)
				return
			}
			c.Journal(b)
		},
		Fail: c.Fail, Log: c.Log,
	})
	server := task.NewServer(task.Options{Set: set, Address: c.Address, PodID: c.PodID, Store: store, Log: c.Log})
	made := &containers{Set: set, server: server}
	ctx, cancel := context.WithTimeout(context.Background(), restoreLimit)
	defer cancel()
	// Before the containers, which look for their streams among the connections.
	if err := server.Adopt(ctx); err != nil {
		return nil, errors.Join(err, made.Close())
	}
	if c.Records != nil {
		if err := set.Restore(ctx, records); err != nil {
			return nil, errors.Join(fmt.Errorf("cannot restore the containers: %w", err), made.Close())
		}
	}
	return made, nil
}

// restoreLimit bounds how long a guest may take to tell a new daemon about its containers.
const restoreLimit = 15 * time.Second

func (c *containers) Serve(l net.Listener) error { return c.server.Serve(l) }

// Close drops the clients before it lets go of the containers, so that no call is answered as if a
// container had ended.
func (c *containers) Close() error {
	err := c.server.Close()
	c.Set.Close()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// HandOver stops the clients' calls before the containers' streams: what a call under way still does
// is in the last records.
func (c *containers) HandOver() error {
	c.server.HandOver()
	c.Set.HandOver()
	return nil
}

// noStorage is the storage of a pod whose machine, and with it its share, is gone.
type noStorage struct{}

var errNoShare = errors.New("the pod's share is gone")

func (noStorage) Rootfs(context.Context, string, []storage.Mount) (string, error) {
	return "", errNoShare
}
func (noStorage) Volume(context.Context, string, string, bool) (string, error) { return "", errNoShare }
func (noStorage) Release(string) error                                         { return nil }
