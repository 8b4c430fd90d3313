package pod

// Client is the kind of a pod's client, as far as kinds differ in how they reach the task API and make
// containers. It does not change in a pod's life.
type Client string

// The kinds of clients. The zero value is containerd's, which announces nothing.
const (
	Containerd Client = ""
	ISulad213  Client = "iSulad 2.1.3" // to 2.1.5
	ISulad216  Client = "iSulad 2.1.6" // and later
)

// Announces says that the client announces containers and processes before it makes them.
func (c Client) Announces() bool { return c == ISulad213 || c == ISulad216 }
