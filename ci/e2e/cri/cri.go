// Package cri is a client of a node's container runtime, as crictl is one: the Container Runtime
// Interface over the runtime's Unix socket, and exec and attach over its streaming server.
package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"
)

// Client talks to one container runtime. Runtime and Images are the whole interface; the methods
// are the sequences that the tests need often.
type Client struct {
	Runtime runtimeapi.RuntimeServiceClient
	Images  runtimeapi.ImageServiceClient
	// Conn is the connection, for the runtime's other services.
	Conn *grpc.ClientConn
}

// Dial returns a client of the runtime that listens on the Unix socket. It does not wait for the
// runtime; see WaitReady. The caller closes it.
func Dial(socket string) (*Client, error) {
	conn, err := grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return nil, fmt.Errorf("cannot connect to the container runtime at %s: %w", socket, err)
	}
	return &Client{
		Runtime: runtimeapi.NewRuntimeServiceClient(conn),
		Images:  runtimeapi.NewImageServiceClient(conn),
		Conn:    conn,
	}, nil
}

// Close closes the connection.
func (c *Client) Close() error { return c.Conn.Close() }

// WaitReady returns when the runtime says that it and its network are ready.
func (c *Client) WaitReady(ctx context.Context) error {
	var last error
	for {
		answer, err := c.Runtime.Status(ctx, &runtimeapi.StatusRequest{}, grpc.WaitForReady(true))
		switch {
		case err != nil:
			last = err
		case ready(answer.GetStatus()):
			return nil
		default:
			last = fmt.Errorf("conditions are %v", answer.GetStatus().GetConditions())
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the container runtime does not become ready: %w", last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func ready(s *runtimeapi.RuntimeStatus) bool {
	for _, condition := range s.GetConditions() {
		required := condition.Type == runtimeapi.RuntimeReady || condition.Type == runtimeapi.NetworkReady
		if required && !condition.Status {
			return false
		}
	}
	return len(s.GetConditions()) > 0
}

// RunPod starts a pod with the runtime handler and returns its id. While the sandboxer's socket
// was away, containerd's connection to it backs off for up to three seconds and answers
// Unavailable at once; a client retries that, and so does this.
func (c *Client) RunPod(ctx context.Context, config *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	for attempt := 0; ; attempt++ {
		answer, err := c.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
		if err == nil {
			return answer.PodSandboxId, nil
		}
		if status.Code(err) != codes.Unavailable || attempt == 20 {
			return "", err
		}
		select {
		case <-ctx.Done():
			return "", err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// RemovePod stops a pod and removes it.
func (c *Client) RemovePod(ctx context.Context, pod string) error {
	if _, err := c.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		return fmt.Errorf("cannot stop pod %s: %w", pod, err)
	}
	if _, err := c.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		return fmt.Errorf("cannot remove pod %s: %w", pod, err)
	}
	return nil
}

// Create makes a container in a pod and returns its id.
func (c *Client) Create(ctx context.Context, pod string, podConfig *runtimeapi.PodSandboxConfig, config *runtimeapi.ContainerConfig) (string, error) {
	answer, err := c.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: pod, Config: config, SandboxConfig: podConfig,
	})
	return answer.GetContainerId(), err
}

// Start starts a created container.
func (c *Client) Start(ctx context.Context, container string) error {
	_, err := c.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: container})
	return err
}

// Status returns what the runtime knows of a container.
func (c *Client) Status(ctx context.Context, container string) (*runtimeapi.ContainerStatus, error) {
	answer, err := c.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: container})
	return answer.GetStatus(), err
}

// WaitExited returns the container's status once it has exited.
func (c *Client) WaitExited(ctx context.Context, container string) (*runtimeapi.ContainerStatus, error) {
	for {
		current, err := c.Status(ctx, container)
		if err != nil {
			return nil, err
		}
		if current.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			return current, nil
		}
		select {
		case <-ctx.Done():
			return current, fmt.Errorf("container %s does not exit, its state is %s: %w", container, current.State, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Result is what an executed command left.
type Result struct {
	Stdout, Stderr string
	ExitCode       int
}

// Exec runs a command in a container without a terminal or input and waits for its end. A code
// other than 0 is no error.
func (c *Client) Exec(ctx context.Context, container string, command ...string) (Result, error) {
	answer, err := c.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: command, Timeout: 20})
	if err != nil {
		return Result{}, err
	}
	return Result{string(answer.Stdout), string(answer.Stderr), int(answer.ExitCode)}, nil
}

// Streams are what a streaming exec or attach is connected to. A nil stream is not connected.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// TTY asks for a terminal, whose output all goes to Stdout.
	TTY bool
	// Sizes of the terminal, the first one set before the command sees any input. The caller
	// closes the channel.
	Sizes <-chan remotecommand.TerminalSize
}

// ExecStream runs a command over the runtime's streaming server, as "crictl exec -i" does, and
// returns its exit code.
func (c *Client) ExecStream(ctx context.Context, container string, streams Streams, command ...string) (int, error) {
	answer, err := c.Runtime.Exec(ctx, &runtimeapi.ExecRequest{
		ContainerId: container, Cmd: command, Tty: streams.TTY,
		Stdin: streams.Stdin != nil, Stdout: streams.Stdout != nil, Stderr: streams.Stderr != nil && !streams.TTY,
	})
	if err != nil {
		return 0, err
	}
	err = stream(ctx, answer.Url, streams)
	var exit utilexec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitStatus(), nil
	}
	return 0, err
}

// Attach connects to the running container's own streams until they end or ctx does.
func (c *Client) Attach(ctx context.Context, container string, streams Streams) error {
	answer, err := c.Runtime.Attach(ctx, &runtimeapi.AttachRequest{
		ContainerId: container, Tty: streams.TTY,
		Stdin: streams.Stdin != nil, Stdout: streams.Stdout != nil, Stderr: streams.Stderr != nil && !streams.TTY,
	})
	if err != nil {
		return err
	}
	return stream(ctx, answer.Url, streams)
}

func stream(ctx context.Context, address string, streams Streams) error {
	location, err := url.Parse(address)
	if err != nil {
		return fmt.Errorf("the runtime's streaming address %q is none: %w", address, err)
	}
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{}, "POST", location)
	if err != nil {
		return fmt.Errorf("cannot stream from %s: %w", address, err)
	}
	options := remotecommand.StreamOptions{Stdin: streams.Stdin, Stdout: streams.Stdout, Tty: streams.TTY}
	if !streams.TTY {
		options.Stderr = streams.Stderr
	}
	if streams.Sizes != nil {
		options.TerminalSizeQueue = sizes(streams.Sizes)
	}
	return executor.StreamWithContext(ctx, options)
}

// sizes is a remotecommand.TerminalSizeQueue.
type sizes <-chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

// Pods lists all pods.
func (c *Client) Pods(ctx context.Context) ([]*runtimeapi.PodSandbox, error) {
	answer, err := c.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	return answer.GetItems(), err
}

// WaitImage returns when the runtime knows an image by its name. It learns of one that was put into
// its store by an event.
func (c *Client) WaitImage(ctx context.Context, name string) error {
	for {
		answer, err := c.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}})
		if err != nil {
			return err
		}
		if slices.Contains(answer.GetImage().GetRepoTags(), name) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the container runtime does not find the image %s: %w", name, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// LoadYAML reads a message of CRI from a YAML file, as crictl does: its field names are those of
// the protocol, and unknown ones are ignored.
func LoadYAML(path string, message any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := yaml.Unmarshal(data, message); err != nil {
		return fmt.Errorf("cannot read %s: %w", path, err)
	}
	return nil
}
