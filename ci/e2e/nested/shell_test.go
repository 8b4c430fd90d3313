package nested

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"
)

// onNode is a test on the node that prints what it does as one sees it on a terminal.
type onNode struct {
	t *testing.T
}

// patience is how long one command may take.
const patience = 2 * time.Minute

// show runs a shell command line that must succeed, prints it with what it writes, and returns the latter.
func (n *onNode) show(line string) string {
	n.t.Helper()
	output, err := n.try(line)
	if err != nil {
		n.t.Fatalf("%s: %v", line, err)
	}
	return output
}

// try is show for a command that may fail.
func (n *onNode) try(line string) (string, error) {
	n.t.Helper()
	fmt.Printf("[root@node ~]# %s\n", line)
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()
	var output bytes.Buffer
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", line)
	cmd.Stdout = io.MultiWriter(&output, os.Stdout)
	cmd.Stderr = cmd.Stdout
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	return output.String(), err
}
