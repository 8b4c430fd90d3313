package nested

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// onNode is a test on the node that prints what it does as one sees it on a terminal.
type onNode struct {
	t *testing.T // of the step that runs
}

// patience is how long one command may take.
const patience = 2 * time.Minute

// step runs a part of the scenarios below a title. Each goes on from where the one before has ended, so a
// failure ends them all.
func (n *onNode) step(title string, run func()) {
	whole := n.t
	began := time.Now()
	ok := whole.Run(title, func(t *testing.T) {
		n.t = t
		fmt.Printf("\n======== %s\n", title)
		run()
	})
	n.t = whole
	fmt.Printf("(%.1f s)\n", time.Since(began).Seconds())
	if !ok {
		n.explain()
		whole.FailNow()
	}
}

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
	output, err := n.quietly(line, os.Stdout)
	if output != "" && !strings.HasSuffix(output, "\n") {
		fmt.Println()
	}
	if err != nil {
		fmt.Printf("(%v)\n", err)
	}
	return output, err
}

// typed runs a command as one who types lines into it, and ends the input once the command has nothing more
// to say: ncat ends when both sides have.
func (n *onNode) typed(line string, input ...string) string {
	n.t.Helper()
	fmt.Printf("[root@node ~]# %s\n", line)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", "exec "+line)
	cmd.Stderr = os.Stdout
	stdin, err := cmd.StdinPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	_, err = io.WriteString(stdin, strings.Join(input, "\n")+"\n")
	var output bytes.Buffer
	_, rerr := io.Copy(io.MultiWriter(&output, os.Stdout), stdout)
	if err = errors.Join(err, rerr, stdin.Close(), cmd.Wait()); err != nil {
		n.t.Fatalf("%s: %v", line, err)
	}
	fmt.Println()
	return output.String()
}

// ask runs a shell command line that must succeed without printing anything.
func (n *onNode) ask(line string) string {
	n.t.Helper()
	output, err := n.quietly(line, io.Discard)
	if err != nil {
		n.t.Fatalf("%s: %v: %s", line, err, output)
	}
	return strings.TrimSpace(output)
}

func (n *onNode) quietly(line string, to io.Writer) (string, error) {
	// The context of a test is done when it has failed, and explain comes later.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var output bytes.Buffer
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", line)
	cmd.Stdout = io.MultiWriter(&output, to)
	cmd.Stderr = cmd.Stdout
	// What it has left in the background may hold its output open.
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	return output.String(), err
}

// says fails the step if a text does not have each of some parts.
func (n *onNode) says(text string, parts ...string) {
	n.t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			n.t.Errorf("there is no %q in what it says", part)
		}
	}
}

// eventually polls until done says true.
func (n *onNode) eventually(what string, done func() bool) {
	n.t.Helper()
	limit := time.After(patience)
	for !done() {
		select {
		case <-limit:
			n.t.Fatalf("it does not happen within %s that %s", patience, what)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// explain prints what one wants to see of a failure.
func (n *onNode) explain() {
	fmt.Println("\n======== what there is to see of the failure")
	for _, line := range []string{
		"journalctl --no-pager --output=cat --unit=kuasar-vmm --lines=60",
		"journalctl --no-pager --output=cat --unit=containerd --priority=warning --lines=20",
		"tail -n 25 /run/kuasar-vmm/*/sandbox-*.log",
		"ps -ef | grep -v '\\[' | cut -c -300",
		"dmesg --level=emerg,alert,crit,err,warn | tail -n 10",
	} {
		n.try(line)
	}
}
