package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
)

// A jsonSetting is a value that must stand in a JSON document, such as "cri-runtimes", "vmm".
type jsonSetting struct {
	path  []string
	value any // as json.Unmarshal makes it: string, bool, map[string]any
	// replaces lists values that may be overwritten: those that mean that nothing was chosen yet.
	replaces []any
}

// setJSON returns text with the setting in it. Everything else stays byte by byte as it is: the
// order of the keys, the blanks, the line ends. What stands there already and means something else
// is an error that says what it is.
func setJSON(text []byte, s jsonSetting) ([]byte, error) {
	if len(bytes.TrimSpace(text)) == 0 {
		text = []byte("{\n}\n")
	}
	var document any
	if err := json.Unmarshal(text, &document); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			return nil, fmt.Errorf("line %d: %w", 1+bytes.Count(text[:min(int(syntax.Offset), len(text))], []byte("\n")), err)
		}
		return nil, err
	}
	start := skipBlanks(text, 0)
	if text[start] != '{' {
		return nil, errors.New("it does not hold a JSON object")
	}
	for depth, key := range s.path {
		object, err := readObject(text, start)
		if err != nil {
			return nil, err
		}
		name := strings.Join(s.path[:depth+1], ".")
		var found *member
		for i := range object.members {
			if object.members[i].name != key {
				continue
			}
			if found != nil {
				return nil, fmt.Errorf("it has the key %q twice", name)
			}
			found = &object.members[i]
		}
		if found == nil {
			return insertMember(text, object, key, nested(s.path[depth+1:], s.value)), nil
		}
		if depth < len(s.path)-1 {
			if text[found.start] != '{' {
				return nil, &Conflict{Key: name, Found: string(text[found.start:found.end]), Want: "an object"}
			}
			start = found.start
			continue
		}
		var got any
		if err := json.Unmarshal(text[found.start:found.end], &got); err != nil {
			return nil, err
		}
		if agrees(got, s.value) {
			return text, nil
		}
		for _, r := range s.replaces {
			if reflect.DeepEqual(got, r) {
				var b []byte
				b = append(b, text[:found.start]...)
				b = append(b, encodeJSON(s.value)...)
				return append(b, text[found.end:]...), nil
			}
		}
		return nil, &Conflict{Key: name, Found: string(text[found.start:found.end]), Want: string(encodeJSON(s.value))}
	}
	return text, nil
}

// agrees says whether got has everything of want. Further keys of an object are the administrator's.
func agrees(got, want any) bool {
	w, ok := want.(map[string]any)
	if !ok {
		return reflect.DeepEqual(got, want)
	}
	g, ok := got.(map[string]any)
	if !ok {
		return false
	}
	for k, v := range w {
		if !agrees(g[k], v) {
			return false
		}
	}
	return true
}

func nested(path []string, value any) any {
	for i := len(path) - 1; i >= 0; i-- {
		value = map[string]any{path[i]: value}
	}
	return value
}

func encodeJSON(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	_ = e.Encode(v) // strings, booleans and maps of them
	return bytes.TrimSpace(b.Bytes())
}

// object is where the parts of a JSON object stand in a text.
type object struct {
	open, close int // the braces
	members     []member
}

type member struct {
	name            string
	key, start, end int // where the key begins, and the value's bounds
}

// readObject finds the members of the object that begins at start, in a text that is valid.
func readObject(text []byte, start int) (object, error) {
	o := object{open: start}
	i := skipBlanks(text, start+1)
	for text[i] != '}' {
		m := member{key: i}
		end := skipValue(text, i)
		if err := json.Unmarshal(text[i:end], &m.name); err != nil {
			return o, err
		}
		m.start = skipBlanks(text, skipBlanks(text, end)+1) // behind the colon
		m.end = skipValue(text, m.start)
		o.members = append(o.members, m)
		if i = skipBlanks(text, m.end); text[i] == ',' {
			i = skipBlanks(text, i+1)
		}
	}
	o.close = i
	return o, nil
}

func skipBlanks(text []byte, i int) int {
	for i < len(text) && (text[i] == ' ' || text[i] == '\t' || text[i] == '\n' || text[i] == '\r') {
		i++
	}
	return i
}

// skipValue returns the index behind the value that begins at i.
func skipValue(text []byte, i int) int {
	depth := 0
	for ; i < len(text); i++ {
		switch c := text[i]; {
		case c == '"':
			for i++; text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
			if depth == 0 {
				return i + 1
			}
		case c == '{' || c == '[':
			depth++
		case c == '}' || c == ']':
			if depth == 0 {
				return i // behind a number or a word
			}
			if depth--; depth == 0 {
				return i + 1
			}
		case depth == 0 && (c == ',' || c == ':' || skipBlanks(text, i) > i):
			return i
		}
	}
	return i
}

// insertMember adds a member behind the last one, laid out as the others are.
func insertMember(text []byte, o object, key string, value any) []byte {
	newline := "\n"
	if bytes.Contains(text, []byte("\r\n")) {
		newline = "\r\n"
	}
	step := indentStep(text)
	outer := indentOf(text, o.open)
	inner := outer + step
	separate := true // a line for each member
	at := o.open + 1
	var b bytes.Buffer
	if n := len(o.members); n > 0 {
		last := o.members[n-1]
		at = last.end
		separate = bytes.ContainsRune(text[o.open:o.members[0].key], '\n')
		if separate {
			inner = indentOf(text, o.members[0].key)
		}
		b.WriteByte(',')
	}
	if separate {
		b.WriteString(newline + inner)
	} else {
		b.WriteByte(' ')
	}
	b.Write(encodeJSON(key))
	b.WriteString(": ")
	if separate {
		var pretty bytes.Buffer
		_ = json.Indent(&pretty, encodeJSON(value), inner, step)
		b.WriteString(strings.ReplaceAll(pretty.String(), "\n", newline))
	} else {
		b.Write(encodeJSON(value))
	}
	rest := text[at:]
	if len(o.members) == 0 {
		// The brace goes on a line of its own.
		rest = text[o.close:]
		b.WriteString(newline + outer)
	}
	out := append([]byte(nil), text[:at]...)
	out = append(out, b.Bytes()...)
	return append(out, rest...)
}

// indentOf is the blanks with which the line of i begins.
func indentOf(text []byte, i int) string {
	start := bytes.LastIndexByte(text[:i], '\n') + 1
	end := start
	for end < len(text) && (text[end] == ' ' || text[end] == '\t') {
		end++
	}
	return string(text[start:end])
}

// indentStep is what the document indents its first member by, or four blanks.
func indentStep(text []byte) string {
	open := skipBlanks(text, 0)
	o, err := readObject(text, open)
	if err != nil || len(o.members) == 0 || !bytes.ContainsRune(text[open:o.members[0].key], '\n') {
		return "    "
	}
	if step := indentOf(text, o.members[0].key); step != "" {
		return step
	}
	return "    "
}
