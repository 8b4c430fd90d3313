// Command kuasar-ctl is the administrator's tool of a node: what it has and lacks, its engine's
// configuration, its pods. It reads the state directories and the kernel, so that it works whether
// or not the daemon does.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

// Exit statuses.
const (
	exitFailed = 1 // what was asked for could not be done, or the node lacks something
	exitUsage  = 2 // the command line is wrong
)

func main() {
	// SIGINT and SIGTERM end a command in order: the console gives the terminal back as it was.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	status := run(ctx, os.Args[1:], streams{os.Stdin, os.Stdout, os.Stderr})
	stop()
	os.Exit(status)
}

// streams are the standard streams of a command.
type streams struct {
	in       *os.File
	out, err io.Writer
}

// run executes one command line and returns the exit status.
func run(ctx context.Context, args []string, s streams) int {
	err := dispatch(ctx, args, s)
	var usage *usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage):
		fmt.Fprintln(s.err, "kuasar-ctl:", err)
		return exitUsage
	case errors.Is(err, errReported):
		return exitFailed
	default:
		fmt.Fprintln(s.err, "kuasar-ctl:", err)
		return exitFailed
	}
}

// errReported ends a command whose output has said already what is wrong.
var errReported = errors.New("reported")

// usageError is a command line that cannot be understood.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }
