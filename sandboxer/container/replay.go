package container

import "context"

type replayKey struct{}

// Replay marks a call that an earlier daemon received and did not answer. It may have been done in
// whole, in part or not at all: now it is brought to its end, and what was done already is no error.
func Replay(ctx context.Context) context.Context { return context.WithValue(ctx, replayKey{}, true) }

func replayed(ctx context.Context) bool { return ctx.Value(replayKey{}) != nil }
