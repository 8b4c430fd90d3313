// Demo runs the pod of the openEuler guide in a virtual machine through a stock containerd, shows
// it, and cleans up. "go tool mage demo" builds what it needs and runs it in ci/e2e.
//
// KEEP=1 in the environment leaves the pod running; END=<directory> ends what was left so.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kuasar.io/kuasar/ci/e2e/census"
	"kuasar.io/kuasar/ci/e2e/cri"
	"kuasar.io/kuasar/ci/e2e/node"
)

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	var err error
	if dir := os.Getenv("END"); dir != "" {
		err = end(dir)
	} else {
		err = demo(ctx, os.Getenv("KEEP") != "")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "\nThe demonstration failed:", err)
		os.Exit(1)
	}
}

func end(dir string) error {
	n, err := node.Open(dir)
	if err != nil {
		return err
	}
	s := &show{}
	if err := errors.Join(s.load(n.Root()), n.Close()); err != nil {
		return err
	}
	if err := os.Remove(s.logPath()); err != nil {
		return err
	}
	fmt.Println("Ended; nothing is left of", dir)
	return nil
}

// show is a demonstration in progress.
type show struct {
	node      *node.Node
	sandboxer *node.Sandboxer
	scope     census.Scope
	before    census.Census

	podConfig       runtimeapi.PodSandboxConfig
	containerConfig runtimeapi.ContainerConfig
	pod, container  string
	address, mac    string
}

// load reads the guide's two files.
func (s *show) load(root string) error {
	for file, message := range map[string]any{"podsandbox.yaml": &s.podConfig, "pod-container.yaml": &s.containerConfig} {
		if err := cri.LoadYAML(filepath.Join(root, "defaults", file), message); err != nil {
			return err
		}
	}
	return nil
}

// step is a part of the demonstration; it prints below its title.
type step struct {
	title string
	run   func(context.Context) error
}

func demo(ctx context.Context, keep bool) (err error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	if err := census.Adopt(); err != nil {
		return err
	}
	s := &show{}
	if err := s.load(root); err != nil {
		return err
	}
	kept := false
	defer func() {
		if s.node != nil && !kept {
			if err != nil {
				if s.sandboxer != nil {
					fmt.Fprintf(os.Stderr, "\nThe last lines of the sandboxer:\n%s\n", node.Tail(s.sandboxer.Log, 10))
				}
				logs := filepath.Join(root, "out", "demo")
				if s.node.KeepLogs(logs) == nil {
					err = fmt.Errorf("%w\nThe logs are in %s", err, logs)
				}
			}
			os.Remove(s.logPath())
			err = errors.Join(err, s.node.Close())
		}
	}()
	steps := []step{
		{"A node: stock containerd, CNI plugins, vmm-sandboxer", func(ctx context.Context) error { return s.start(ctx, root) }},
		{"The guide's pod and container: crictl run -r vmm pod-container.yaml podsandbox.yaml", s.runPod},
		{"crictl pods", s.pods},
		{"crictl ps", s.containers},
		{"The virtual machine: ps -ef | grep <pod>", s.machine},
		{"The pod's files: ls -al <state directory>/<pod>", s.files},
		{"In the guest's debug console: ip addr show", s.addresses},
		{"In the guest's debug console: ping the gateway", s.ping},
		{"crictl exec <container> sh -c 'uname -a; exit 7'", s.exec},
		{"crictl logs <container>", s.log},
	}
	if keep {
		steps = append(steps, step{"KEEP=1: it stays", func(context.Context) error { return s.keep() }})
	} else {
		steps = append(steps, step{"crictl stopp, crictl rmp", s.remove}, step{"What is left", s.leftovers})
	}
	began := time.Now()
	for _, step := range steps {
		fmt.Printf("\n── %s\n", step.title)
		at := time.Now()
		if err := step.run(ctx); err != nil {
			if ctx.Err() != nil {
				err = errors.New("interrupted")
			}
			return fmt.Errorf("at %q: %w", step.title, err)
		}
		fmt.Printf("   (%.2f s)\n", time.Since(at).Seconds())
	}
	kept = keep
	fmt.Printf("\nAll of it took %.1f s.\n", time.Since(began).Seconds())
	return nil
}

func (s *show) start(ctx context.Context, root string) error {
	var err error
	s.node, err = node.Start(ctx, node.Config{
		Root:      root,
		Sandboxer: filepath.Join(root, "out", "bin", "vmm-sandboxer"),
		Kernel:    filepath.Join(root, "out", "vmlinux.bin"),
		Initrd:    filepath.Join(root, "out", "kuasar.initrd"),
		Progress:  os.Stdout,
	})
	if err != nil {
		return err
	}
	if s.sandboxer, err = s.node.StartSandboxer(ctx, node.Plugin, nil); err != nil {
		return err
	}
	version, err := s.node.CRI.Runtime.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return err
	}
	fmt.Printf("%s %s at %s\n", version.RuntimeName, version.RuntimeVersion, s.node.Socket)
	fmt.Printf("vmm-sandboxer, process %d, at %s\n", s.sandboxer.PID(), s.sandboxer.Socket)
	// containerd connects to the sandboxer with its first request and stays connected. A pod that is
	// refused is such a request, so that the connection is not counted as something left behind.
	_, err = s.node.CRI.RunPod(ctx, &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "refused", Namespace: "default", Uid: "refused"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE},
		}},
	}, node.Handler)
	if err == nil {
		return errors.New("a pod with the host's network was not refused")
	}
	s.scope = census.Scope{
		Dirs:          []string{s.sandboxer.Dir},
		Mounts:        s.node.Dir,
		Bridge:        s.node.Bridge,
		CgroupParents: []string{"/kuasar-vmm"},
		Daemons:       map[string]int{"vmm-sandboxer": s.sandboxer.PID()},
		Metrics:       s.sandboxer.Metrics(),
	}
	s.before, err = census.Take(s.scope)
	return err
}

func (s *show) runPod(ctx context.Context) error {
	began := time.Now()
	var err error
	if s.pod, err = s.node.CRI.RunPod(ctx, &s.podConfig, node.Handler); err != nil {
		return err
	}
	ready := time.Now()
	fmt.Printf("pod       %s  ready after %.2f s\n", s.pod, ready.Sub(began).Seconds())
	if s.container, err = s.node.CRI.Create(ctx, s.pod, &s.podConfig, &s.containerConfig); err != nil {
		return err
	}
	if err := s.node.CRI.Start(ctx, s.container); err != nil {
		return err
	}
	fmt.Printf("container %s  running %.2f s later\n", s.container, time.Since(ready).Seconds())

	status, err := s.node.CRI.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.pod, Verbose: true})
	if err != nil {
		return err
	}
	s.address = status.Status.GetNetwork().GetIp()
	var info struct {
		CNIResult struct {
			Interfaces map[string]struct{ Mac string }
		} `json:"cniResult"`
	}
	if err := json.Unmarshal([]byte(status.Info["info"]), &info); err != nil {
		return fmt.Errorf("containerd does not say what CNI did: %w", err)
	}
	s.mac = info.CNIResult.Interfaces["eth0"].Mac
	return nil
}

// table prints rows of columns.
func table(rows ...[]string) {
	out := tabwriter.NewWriter(os.Stdout, 0, 8, 3, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(out, strings.Join(row, "\t"))
	}
	out.Flush()
}

func (s *show) pods(ctx context.Context) error {
	pods, err := s.node.CRI.Pods(ctx)
	if err != nil {
		return err
	}
	rows := [][]string{{"POD ID", "CREATED", "STATE", "NAME", "NAMESPACE", "ATTEMPT"}}
	ready := false
	for _, p := range pods {
		state := "NotReady"
		if p.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			state, ready = "Ready", ready || p.Id == s.pod
		}
		rows = append(rows, []string{p.Id[:13], ago(p.CreatedAt), state, p.Metadata.Name, p.Metadata.Namespace, fmt.Sprint(p.Metadata.Attempt)})
	}
	table(rows...)
	if !ready {
		return errors.New("the pod is not Ready")
	}
	return nil
}

func (s *show) containers(ctx context.Context) error {
	answer, err := s.node.CRI.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return err
	}
	rows := [][]string{{"CONTAINER", "IMAGE", "CREATED", "STATE", "NAME", "ATTEMPT", "POD ID"}}
	running := false
	for _, c := range answer.Containers {
		state := strings.TrimPrefix(c.State.String(), "CONTAINER_")
		state = state[:1] + strings.ToLower(state[1:])
		running = running || c.Id == s.container && c.State == runtimeapi.ContainerState_CONTAINER_RUNNING
		rows = append(rows, []string{c.Id[:13], s.containerConfig.Image.Image, ago(c.CreatedAt), state, c.Metadata.Name, fmt.Sprint(c.Metadata.Attempt), c.PodSandboxId[:13]})
	}
	table(rows...)
	if !running {
		return errors.New("the container is not Running")
	}
	return nil
}

func ago(nanoseconds int64) string {
	return fmt.Sprintf("%.1f seconds ago", time.Since(time.Unix(0, nanoseconds)).Seconds())
}

func (s *show) machine(context.Context) error {
	pid, args, err := s.sandboxer.VMM(s.pod)
	if err != nil {
		return err
	}
	line := strings.Join(args, " ")
	fmt.Printf("%d %s\n", pid, line)
	for _, want := range []string{"-name sandbox-" + s.pod, "-kernel " + s.node.Kernel(), "-initrd " + s.node.Initrd()} {
		if !strings.Contains(line, want) {
			return fmt.Errorf("the command line has no %q", want)
		}
	}
	return nil
}

func (s *show) files(context.Context) error {
	dir := filepath.Join(s.sandboxer.Dir, s.pod)
	fmt.Println(dir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	missing := map[string]bool{"console.sock": true, "sandbox-" + s.pod + ".log": true, "sandbox-" + s.pod + ".pid": true}
	var rows [][]string
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			return err
		}
		rows = append(rows, []string{info.Mode().String(), fmt.Sprint(info.Size()), entry.Name()})
		delete(missing, entry.Name())
	}
	table(rows...)
	for name := range missing {
		return fmt.Errorf("%s is missing", name)
	}
	return nil
}

func (s *show) addresses(ctx context.Context) error {
	output, err := s.console(ctx, "ip addr show")
	if err != nil {
		return err
	}
	eth0 := regexp.MustCompile(`(?s)eth0.*`).FindString(output)
	for what, want := range map[string]string{"address": "inet " + s.address + "/", "MAC": s.mac} {
		if want == "" || !strings.Contains(eth0, want) {
			return fmt.Errorf("eth0 in the guest does not carry the %s that CNI gave, %s", what, want)
		}
	}
	fmt.Printf("   eth0 has what CNI gave to the pod: %s, %s\n", s.address, s.mac)
	return nil
}

func (s *show) ping(ctx context.Context) error {
	output, err := s.console(ctx, "ping -c 3 "+s.node.Gateway)
	if err != nil {
		return err
	}
	if replies := strings.Count(output, "bytes from "+s.node.Gateway); replies != 3 {
		return fmt.Errorf("%d of 3 replies from %s", replies, s.node.Gateway)
	}
	fmt.Printf("   3 of 3 replies\n")
	return nil
}

func (s *show) console(ctx context.Context, line string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	output, err := s.sandboxer.Console(ctx, s.pod, line)
	fmt.Print(output)
	return output, err
}

func (s *show) exec(ctx context.Context) error {
	result, err := s.node.CRI.Exec(ctx, s.container, "sh", "-c", "uname -a; exit 7")
	if err != nil {
		return err
	}
	fmt.Print(result.Stdout, result.Stderr)
	fmt.Printf("exit code %d\n", result.ExitCode)
	if result.ExitCode != 7 || !strings.HasPrefix(result.Stdout, "Linux "+s.podConfig.Hostname) {
		return errors.New("that is not what \"sh -c 'uname -a; exit 7'\" does")
	}
	return nil
}

func (s *show) logPath() string {
	return filepath.Join(s.podConfig.LogDirectory, s.containerConfig.LogPath)
}

func (s *show) log(ctx context.Context) error {
	path := s.logPath()
	for {
		if data, err := os.ReadFile(path); err != nil {
			return err
		} else if strings.Contains(string(data), "Load average") {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	// top moves the cursor about, which would garble this.
	fmt.Printf("%s:\n%s\n", path, regexp.MustCompile(`\x1b\[[0-9;]*[A-Za-z]`).ReplaceAllString(node.Tail(path, 6), ""))
	return nil
}

func (s *show) remove(ctx context.Context) error {
	if err := s.node.CRI.RemovePod(ctx, s.pod); err != nil {
		return err
	}
	if err := os.Remove(s.logPath()); err != nil {
		return err
	}
	fmt.Println("stopped and removed", s.pod)
	return nil
}

func (s *show) leftovers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	difference, err := census.Settle(ctx, s.scope, s.before)
	if err != nil {
		return err
	}
	if len(difference) > 0 {
		return fmt.Errorf("the pod left something behind:\n%s", strings.Join(difference, "\n"))
	}
	if err := s.node.Close(); err != nil {
		return err
	}
	s.node = nil
	fmt.Println("Nothing was left behind: no process, mount, network interface, cgroup, file or descriptor.")
	return nil
}

func (s *show) keep() error {
	if err := s.node.Keep(); err != nil {
		return err
	}
	fmt.Printf(`With a crictl of yours:
    crictl -r unix://%[1]s pods
    crictl -r unix://%[1]s exec -it %.13[2]s sh
In the guest (as root of the pod; "socat" or another client of Unix sockets):
    socat -,raw,echo=0 UNIX-CONNECT:%[3]s
What was written:
    %[4]s
    %[5]s
To end it:
    END=%[6]s go tool mage demo
`, s.node.Socket, s.container, filepath.Join(s.sandboxer.Dir, s.pod, "debug.sock"), s.sandboxer.Log, s.node.ContainerdLog(), s.node.Dir)
	return nil
}
