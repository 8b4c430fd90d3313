package protocol

import (
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		agent, oldestHost uint32 // of the agent's hello
		host, oldestAgent uint32
		want              string
	}{
		"same build":                   {1, 1, 1, 1, ""},
		"an agent of before the field": {1, 0, 1, 1, ""},
		"upgraded host":                {1, 1, 2, 1, ""},
		"upgraded, agent says nothing": {1, 0, 2, 1, ""},
		"upgraded too far":             {1, 1, 3, 2, "from version 2 on"},
		"downgraded host":              {2, 1, 1, 1, ""},
		"downgraded, agent insists":    {2, 2, 1, 1, "this one is of version 1"},
		"downgraded, agent is silent":  {2, 0, 1, 1, "this one is of version 1"},
		"no version":                   {0, 0, 1, 1, "version 0"},
		"no version but a host's":      {0, 1, 1, 1, "version 0"},
		"nonsense":                     {1<<32 - 1, 1<<32 - 1, 1, 1, "this one is of version 1"},
	} {
		err := check(&Hello{ProtocolVersion: c.agent, OldestHost: c.oldestHost}, c.host, c.oldestAgent)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	// Whatever the constants are, the two sides of one build belong together.
	if err := (&Hello{ProtocolVersion: Version, OldestHost: OldestHost}).Check(); err != nil {
		t.Error(err)
	}
}
