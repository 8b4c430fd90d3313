package isulad

import (
	"encoding/json"
	"os"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// edited is the pod's configuration as iSulad hands it on: kubelet's, with what iSulad fills in. The
// pod's own stays as it is.
func (p *Pod) edited() (*runtimeapi.PodSandboxConfig, error) {
	c := &runtimeapi.PodSandboxConfig{}
	if p.Config != nil {
		c = proto.CloneOf(p.Config)
	}
	hostNetwork := c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE
	if c.Hostname == "" {
		c.Hostname = p.ID
		if hostNetwork {
			host, err := os.Hostname()
			if err != nil {
				return nil, err
			}
			c.Hostname = host
		}
	}
	if c.Labels == nil {
		c.Labels = make(map[string]string)
	}
	c.Labels["cri.isulad.type"] = "podsandbox"
	c.Labels["io.kubernetes.container.name"] = "POD"
	checkpoint, err := checkpointOf(c, hostNetwork)
	if err != nil {
		return nil, err
	}
	if c.Annotations == nil {
		c.Annotations = make(map[string]string)
	}
	c.Annotations["io.kubernetes.cri.container-type"] = "sandbox"
	c.Annotations["cri.sandbox.isulad.checkpoint"] = checkpoint
	if m := c.Metadata; m != nil {
		c.Annotations["io.kubernetes.cri.sandbox-namespace"] = m.Namespace
		c.Annotations["io.kubernetes.cri.sandbox-name"] = m.Name
		c.Annotations["io.kubernetes.cri.sandbox-uid"] = m.Uid
		c.Annotations["io.kubernetes.cri.sandbox-attempt"] = strconv.FormatUint(uint64(m.Attempt), 10)
	}
	if c.Linux == nil {
		c.Linux = &runtimeapi.LinuxPodSandboxConfig{}
	}
	if c.Linux.Resources == nil {
		// No limits, and the smallest weight.
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 2}
	}
	c.Linux.Resources.OomScoreAdj = -998
	return c, nil
}

// checkpointOf is what iSulad remembers of a pod's network in an annotation of its own.
func checkpointOf(c *runtimeapi.PodSandboxConfig, hostNetwork bool) (string, error) {
	type port struct {
		Protocol      string `json:"protocol,omitempty"`
		ContainerPort int32  `json:"container_port,omitempty"`
		HostPort      int32  `json:"host_port,omitempty"`
	}
	var checkpoint struct {
		Version   string `json:"version"`
		Name      string `json:"name,omitempty"`
		Namespace string `json:"namespace,omitempty"`
		Data      struct {
			PortMappings []port `json:"port_mappings,omitempty"`
			HostNetwork  bool   `json:"host_network,omitempty"`
		} `json:"data"`
	}
	checkpoint.Version = "v1"
	checkpoint.Name, checkpoint.Namespace = c.GetMetadata().GetName(), c.GetMetadata().GetNamespace()
	checkpoint.Data.HostNetwork = hostNetwork
	for _, p := range c.PortMappings {
		protocol := "tcp"
		if p.Protocol == runtimeapi.Protocol_UDP {
			protocol = "udp"
		}
		checkpoint.Data.PortMappings = append(checkpoint.Data.PortMappings, port{protocol, p.ContainerPort, p.HostPort})
	}
	text, err := json.Marshal(checkpoint)
	return string(text), err
}

// sandboxName is the name that iSulad makes of a pod's metadata.
func sandboxName(m *runtimeapi.PodSandboxMetadata) string {
	return strings.Join([]string{"k8s", "POD", m.GetName(), m.GetNamespace(), m.GetUid(),
		strconv.FormatUint(uint64(m.GetAttempt()), 10)}, "_")
}
