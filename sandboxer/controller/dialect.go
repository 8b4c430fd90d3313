package controller

import (
	"google.golang.org/protobuf/encoding/protowire"

	"kuasar.io/kuasar/sandboxer/pod"
)

// dialect is one numbering of the fields of the service's messages.
type dialect interface {
	decode(m method, raw []byte) (request, error)
	encode(m method, r result) ([]byte, error)
	// client is who speaks it.
	client() pod.Client
}

// tasksField is the word in an Update's field mask that makes it a snapshot of a pod's containers.
const tasksField = "extensions.tasks"

// fields is what a message has at its top level.
type fields struct {
	// text tells which of the fields up to 10 hold bytes, and at least one of them.
	text [11]bool
	// typed says that an Any in field 3 names its type, tasks that a field 4 is tasksField.
	typed, tasks bool
}

// scan reads the top level of a message. Of a malformed one it tells what comes before the defect:
// every dialect refuses those, and says where.
func scan(raw []byte) fields {
	var f fields
	each(raw, func(n protowire.Number, value []byte) {
		if int(n) < len(f.text) && len(value) > 0 {
			f.text[n] = true
		}
		switch n {
		case 3:
			each(value, func(n protowire.Number, url []byte) { f.typed = f.typed || n == 1 && len(url) > 0 })
		case 4:
			f.tasks = f.tasks || string(value) == tasksField
		}
	})
	return f
}

// each calls visit for the fields of a message that hold bytes, up to a defect.
func each(raw []byte, visit func(protowire.Number, []byte)) {
	for len(raw) > 0 {
		number, kind, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return
		}
		raw = raw[n:]
		if kind == protowire.BytesType {
			value, n := protowire.ConsumeBytes(raw)
			if n < 0 {
				return
			}
			visit(number, value)
			raw = raw[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(number, kind, raw); n < 0 {
			return
		}
		raw = raw[n:]
	}
}

// rules tell the dialect of a request; the first that holds decides.
var rules = []struct {
	name    string
	holds   func(m method, f fields) bool
	dialect dialect
}{
	{
		"only iSulad 2.1.3 to 2.1.5 has the method",
		func(m method, _ fields) bool { return m == prepare || m == purge || m == updateResources },
		isulad213{},
	},
	{
		"an update of tasks",
		func(m method, f fields) bool { return m == update && f.tasks },
		isulad216{},
	},
	{
		"only containerd 2.x has the method otherwise",
		func(m method, _ fields) bool { return m == update || m == measure },
		containerd{},
	},
	{
		"containerd describes the sandbox in field 6 of Create",
		func(m method, f fields) bool { return m == create && f.text[6] },
		containerd{},
	},
	{
		"the sandboxer in field 10, and options without a type",
		func(m method, f fields) bool { return m == create && f.text[10] && !f.typed },
		isulad216{},
	},
	{
		// The same bytes from both clients of these numbers.
		"the sandboxer in field 10",
		func(_ method, f fields) bool { return f.text[10] },
		containerd{},
	},
	{
		// Elsewhere it is a number, or a mount.
		"the sandbox's id in field 2",
		func(_ method, f fields) bool { return f.text[2] },
		isulad213{},
	},
	{
		"containerd may leave the sandboxer out",
		func(method, fields) bool { return true },
		containerd{},
	},
}

// dialectOf tells in which dialect a request is.
func dialectOf(m method, raw []byte) dialect {
	f := scan(raw)
	for _, r := range rules {
		if r.holds(m, f) {
			return r.dialect
		}
	}
	panic("the last rule always holds")
}
