package e2e

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"kuasar.io/kuasar/ci/e2e/node"
)

// controller connects to the sandboxer itself, without containerd between.
func controller(ctx context.Context, t *testing.T) (context.Context, *grpc.ClientConn) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+sandboxer.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return metadata.AppendToOutgoingContext(ctx, "containerd-namespace", "k8s.io"), conn
}

// createRequest is what containerd sends for a pod.
func createRequest(t *testing.T, id, netns string) *sandboxapi.ControllerCreateRequest {
	t.Helper()
	config, err := proto.Marshal(podConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	return &sandboxapi.ControllerCreateRequest{
		SandboxID: id, NetnsPath: netns, Sandboxer: node.Plugin,
		Options: &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: config},
	}
}

func TestIDsThatAreRefused(t *testing.T) {
	ctx, conn := controller(begin(t), t)
	client := sandboxapi.NewControllerClient(conn)
	for _, id := range []string{"", "a/b", "..", ".", "../../etc", "-x", "a\x00b", strings.Repeat("a", 300)} {
		t.Run(fmt.Sprintf("%.20q", id), func(t *testing.T) {
			if _, err := client.Create(ctx, createRequest(t, id, filepath.Join(bed.Dir, "no-such-netns"))); status.Code(err) != codes.InvalidArgument {
				t.Errorf("Create: %v", err)
			}
			if _, err := client.Start(ctx, &sandboxapi.ControllerStartRequest{SandboxID: id}); err == nil {
				t.Error("Start succeeds")
			}
			if _, err := client.Shutdown(ctx, &sandboxapi.ControllerShutdownRequest{SandboxID: id}); !acceptable(err, codes.InvalidArgument, codes.NotFound) {
				t.Errorf("Shutdown: %v", err)
			}
		})
	}
}

// acceptable says whether err is none or has one of the codes.
func acceptable(err error, wanted ...codes.Code) bool {
	return err == nil || slices.Contains(wanted, status.Code(err))
}

func TestPodsThatDoNotExist(t *testing.T) {
	ctx, conn := controller(begin(t), t)
	client := sandboxapi.NewControllerClient(conn)
	const id = "no-such-pod"
	if _, err := client.Start(ctx, &sandboxapi.ControllerStartRequest{SandboxID: id}); status.Code(err) != codes.NotFound {
		t.Errorf("Start: %v", err)
	}
	if _, err := client.Status(ctx, &sandboxapi.ControllerStatusRequest{SandboxID: id}); status.Code(err) != codes.NotFound {
		t.Errorf("Status: %v", err)
	}
	if _, err := client.Wait(ctx, &sandboxapi.ControllerWaitRequest{SandboxID: id}); status.Code(err) != codes.NotFound {
		t.Errorf("Wait: %v", err)
	}
	for range 2 {
		if _, err := client.Stop(ctx, &sandboxapi.ControllerStopRequest{SandboxID: id}); !acceptable(err, codes.NotFound) {
			t.Errorf("Stop: %v", err)
		}
		if _, err := client.Shutdown(ctx, &sandboxapi.ControllerShutdownRequest{SandboxID: id}); !acceptable(err, codes.NotFound) {
			t.Errorf("Shutdown: %v", err)
		}
	}
}

func TestStopAndShutdownTwice(t *testing.T) {
	ctx := begin(t)
	id, err := bed.CRI.RunPod(ctx, podConfig(t), node.Handler)
	if err != nil {
		t.Fatal(err)
	}
	direct, conn := controller(ctx, t)
	client := sandboxapi.NewControllerClient(conn)
	for range 2 {
		if _, err := client.Stop(direct, &sandboxapi.ControllerStopRequest{SandboxID: id}); err != nil {
			t.Errorf("Stop: %v", err)
		}
	}
	for range 2 {
		if _, err := client.Shutdown(direct, &sandboxapi.ControllerShutdownRequest{SandboxID: id}); !acceptable(err, codes.NotFound) {
			t.Errorf("Shutdown: %v", err)
		}
	}
	if err := bed.CRI.RemovePod(ctx, id); err != nil {
		t.Errorf("containerd cannot remove what is gone: %v", err)
	}
}

func TestIDThatIsInUse(t *testing.T) {
	ctx := begin(t)
	p := runPod(ctx, t, podConfig(t), node.Handler)
	namespaces, err := filepath.Glob(filepath.Join(bed.Dir, "state", "io.containerd.grpc.v1.cri", "netns", "*"))
	if err != nil || len(namespaces) != 1 {
		t.Fatalf("the pod's network namespace is not to be found: %q, %v", namespaces, err)
	}
	direct, conn := controller(ctx, t)
	if _, err := sandboxapi.NewControllerClient(conn).Create(direct, createRequest(t, p.id, namespaces[0])); status.Code(err) != codes.AlreadyExists {
		t.Errorf("Create of an id that runs: %v", err)
	}
	exec(ctx, t, p.start(ctx, t, container("sleep 1000")), "true")
}

func TestNetworkNamespaceThatIsGone(t *testing.T) {
	ctx, conn := controller(begin(t), t)
	client := sandboxapi.NewControllerClient(conn)
	const id = "without-a-network-namespace"
	gone := filepath.Join(bed.Dir, "no-such-netns")
	_, err := client.Create(ctx, createRequest(t, id, gone))
	if err == nil {
		_, err = client.Start(ctx, &sandboxapi.ControllerStartRequest{SandboxID: id})
	}
	if err == nil || !strings.Contains(err.Error(), gone) {
		t.Errorf("the error does not name the path: %v", err)
	}
	if _, err := client.Shutdown(ctx, &sandboxapi.ControllerShutdownRequest{SandboxID: id}); !acceptable(err, codes.NotFound) {
		t.Error(err)
	}
}

// raw is a codec that sends bytes as they are.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)      { return v.([]byte), nil }
func (raw) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (raw) Name() string                       { return "proto" }

func TestMalformedAndOversizedRequests(t *testing.T) {
	ctx, conn := controller(begin(t), t)
	all := []string{"Create", "Start", "Stop", "Status", "Shutdown"}
	for _, test := range []struct {
		name    string
		bytes   []byte
		methods []string
	}{
		{"not protobuf", []byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), all},
		{"a field that is cut off", []byte("\x0a\x7fabc"), all},
		{"a wrong wire type", []byte("\x09abcdefgh"), all},
		// Stop and Shutdown of an id that nobody has are done at once, however long it is.
		{"16 MiB", append([]byte("\x0a\x80\x80\x80\x08"), bytes.Repeat([]byte("a"), 16<<20)...), []string{"Create", "Start", "Status"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, method := range test.methods {
				var answer []byte
				err := conn.Invoke(ctx, "/containerd.services.sandbox.v1.Controller/"+method, test.bytes, &answer, grpc.ForceCodec(raw{}))
				if err == nil || status.Code(err) == codes.Unavailable {
					t.Errorf("%s: %v", method, err)
				}
			}
		})
	}
	answer, err := sandboxapi.NewControllerClient(conn).Platform(ctx, &sandboxapi.ControllerPlatformRequest{})
	if err != nil || answer.Platform.OS != "linux" {
		t.Errorf("afterwards the sandboxer says its platform is %v, %v", answer, err)
	}
}
