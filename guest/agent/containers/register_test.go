package containers

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protodesc"
)

// The whole of both versions is served, under their own names.
func TestRegister(t *testing.T) {
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	New(Options{}).Register(server)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(context.Background(), l)
	defer server.Close()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()

	for service, api := range map[string]reflect.Type{
		"containerd.task.v2.Task": reflect.TypeFor[taskv2.TTRPCTaskService](),
		"containerd.task.v3.Task": reflect.TypeFor[taskv3.TTRPCTaskService](),
	} {
		for i := range api.NumMethod() {
			name := api.Method(i).Name
			err := client.Call(t.Context(), service, name, &taskv3.StateRequest{ID: "none"}, &taskv3.StateResponse{})
			if status.Code(err) == codes.Unimplemented && name != "Checkpoint" {
				t.Errorf("%s of %s: %v", name, service, err)
			}
		}
	}
	_, err = taskv3.NewTTRPCTaskClient(client).State(t.Context(), &taskv3.StateRequest{ID: "none"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("State of an unknown container: %v", err)
	}
}

// One set of Go types serves both versions only as long as their messages are the same.
func TestVersionsHaveTheSameMessages(t *testing.T) {
	messages := func(service string) map[string]string {
		all := map[string]string{}
		file := protodesc.ToFileDescriptorProto(taskv2.File_runtime_task_v2_shim_proto)
		if service == "v3" {
			file = protodesc.ToFileDescriptorProto(taskv3.File_runtime_task_v3_shim_proto)
		}
		for _, m := range file.MessageType {
			fields := ""
			for _, f := range m.Field {
				kind := strings.TrimPrefix(f.GetTypeName(), ".containerd.task."+service)
				fields += fmt.Sprintln(f.GetNumber(), f.GetName(), f.GetLabel(), f.GetType(), kind)
			}
			all[m.GetName()] = fields
		}
		return all
	}
	v2, v3 := messages("v2"), messages("v3")
	if !reflect.DeepEqual(v2, v3) {
		t.Errorf("version 2:\n%v\nversion 3:\n%v", v2, v3)
	}
}
