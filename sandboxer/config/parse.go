package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
)

// fields maps every known key to where its value goes: a *string, *int or *bool.
func (c *Config) fields() map[string]any {
	h := &c.Hypervisor
	return map[string]any{
		"sandbox.log_level":              &c.Sandbox.LogLevel,
		"sandbox.isulad_task_address":    &c.Sandbox.ISuladTaskAddress,
		"sandbox.boot_timeout_in_s":      &c.Sandbox.BootTimeoutInS,
		"hypervisor.path":                &h.Path,
		"hypervisor.machine_type":        &h.MachineType,
		"hypervisor.kernel_path":         &h.KernelPath,
		"hypervisor.image_path":          &h.ImagePath,
		"hypervisor.initrd_path":         &h.InitrdPath,
		"hypervisor.firmware":            &h.Firmware,
		"hypervisor.kernel_params":       &h.KernelParams,
		"hypervisor.vcpus":               &h.VCPUs,
		"hypervisor.memory_in_mb":        &h.MemoryInMB,
		"hypervisor.max_vcpus":           &h.MaxVCPUs,
		"hypervisor.max_memory_in_mb":    &h.MaxMemoryInMB,
		"hypervisor.block_device_driver": &h.BlockDeviceDriver,
		"hypervisor.debug":               &h.Debug,
		"hypervisor.enable_mem_prealloc": &h.EnableMemPrealloc,
		"hypervisor.accelerator":         &h.Accelerator,
		"hypervisor.virtiofsd_conf.path": &h.Virtiofsd.Path,
	}
}

// tables are the keys that hold other keys.
var tables = []string{"sandbox", "hypervisor", "hypervisor.virtiofsd_conf", "hypervisor.virtiofsd"}

func parse(text, arch string) (*Config, error) {
	var tree map[string]any
	if _, err := toml.Decode(text, &tree); err != nil {
		var pe toml.ParseError
		if errors.As(err, &pe) {
			return nil, fmt.Errorf("line %d: %s", pe.Position.Line, pe.Message)
		}
		return nil, err
	}
	line := lineFinder(text)
	cfg := defaults(arch)
	fields := cfg.fields()
	flat := map[string]any{}
	var errs []error
	flatten("", tree, flat, func(key, got string) {
		errs = append(errs, keyError(key, line(key), fmt.Sprintf("expected a table, got %s", got)))
	})
	names := cfg.translate(flat, arch, func(key, msg string) { errs = append(errs, keyError(key, line(key), msg)) })
	// Errors name a key as the file does.
	wrong := func(key, msg string) error {
		if theirs := names[key]; theirs != "" {
			key = theirs
		}
		return keyError(key, line(key), msg)
	}
	// An image replaces the default initrd; only a file that sets both is contradictory.
	if v, _ := flat["hypervisor.image_path"].(string); v != "" {
		cfg.Hypervisor.InitrdPath = ""
	}
	for key, value := range flat {
		dst, known := fields[key]
		if !known {
			errs = append(errs, keyError(key, line(key), unknown(key, fields)))
			continue
		}
		if msg := assign(dst, value); msg != "" {
			errs = append(errs, wrong(key, msg))
		}
	}
	if len(errs) > 0 {
		// In the order of the file, as far as lines are known.
		slices.SortFunc(errs, func(a, b error) int {
			ka, kb := a.(*KeyError), b.(*KeyError)
			if ka.Line != kb.Line {
				return ka.Line - kb.Line
			}
			return strings.Compare(ka.Key, kb.Key)
		})
		return nil, errors.Join(errs...)
	}
	if err := cfg.validate(arch, wrong); err != nil {
		return nil, err
	}
	return cfg, nil
}

// KeyError says what is wrong with one key of a file.
type KeyError struct {
	Key  string // dotted, such as hypervisor.vcpus
	Line int    // from 1, or 0 when it is not known or the key is absent
	Msg  string
}

func (e *KeyError) Error() string {
	if e.Line > 0 {
		return fmt.Sprintf("line %d: %s: %s", e.Line, e.Key, e.Msg)
	}
	return fmt.Sprintf("%s: %s", e.Key, e.Msg)
}

func keyError(key string, line int, msg string) error {
	return &KeyError{Key: key, Line: line, Msg: msg}
}

// flatten collects the leaves of tree by dotted key. A known table that is no table is reported to
// notTable; an empty unknown table counts as a leaf, or it would be accepted silently.
func flatten(prefix string, tree map[string]any, into map[string]any, notTable func(key, got string)) {
	for name, value := range tree {
		key := name
		if prefix != "" {
			key = prefix + "." + name
		}
		isTable := slices.Contains(tables, key)
		if sub, ok := value.(map[string]any); ok {
			if isTable || len(sub) > 0 {
				flatten(key, sub, into, notTable)
				continue
			}
		} else if isTable {
			notTable(key, typeName(value))
			continue
		}
		into[key] = value
	}
}

// assign stores value in dst, or says why it cannot.
func assign(dst, value any) string {
	switch d := dst.(type) {
	case *string:
		if v, ok := value.(string); ok {
			*d = v
			return ""
		}
		return "expected a string in quotes, got " + typeName(value)
	case *bool:
		if v, ok := value.(bool); ok {
			*d = v
			return ""
		}
		return "expected true or false, got " + typeName(value)
	case *int:
		v, ok := value.(int64)
		if !ok {
			return "expected an integer, got " + typeName(value)
		}
		if int64(int(v)) != v {
			return fmt.Sprintf("%d is too large", v)
		}
		*d = int(v)
		return ""
	default:
		panic(fmt.Sprintf("config: no rule for %T", dst))
	}
}

func typeName(value any) string {
	switch v := value.(type) {
	case string:
		return fmt.Sprintf("the string %q", v)
	case int64:
		return fmt.Sprintf("the integer %d", v)
	case float64:
		return fmt.Sprintf("the floating-point number %v", v)
	case bool:
		return fmt.Sprintf("the boolean %t", v)
	case map[string]any:
		return "a table"
	case []any, []map[string]any:
		return "an array"
	default:
		return "a date or time"
	}
}

func unknown(key string, fields map[string]any) string {
	known := make([]string, 0, len(fields))
	for k := range fields {
		known = append(known, k)
	}
	slices.Sort(known)
	msg := "unknown key"
	if near := nearest(key, known); near != "" {
		msg += fmt.Sprintf("; did you mean %s?", near)
	}
	return msg
}

// nearest returns the candidate with the smallest edit distance to word, or "" when none is near
// enough to be a slip of the pen. A key in the wrong table counts as near.
func nearest(word string, candidates []string) string {
	last := func(s string) string { return s[strings.LastIndexByte(s, '.')+1:] }
	best, bestDistance := "", 0
	for _, c := range candidates {
		d := distance(word, c)
		if strings.Contains(c, ".") {
			d = min(d, distance(last(word), last(c))+1)
		}
		if d <= max(2, len(last(c))/2) && (best == "" || d < bestDistance) {
			best, bestDistance = c, d
		}
	}
	return best
}

// distance is Levenshtein's, on bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j+1]+1, row[j]+1, diagonal+cost)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}

// lineFinder returns a function that finds the line of a key in text, 0 when it cannot. It reads
// the plain form of TOML that such files have: one table header or one key per line.
func lineFinder(text string) func(key string) int {
	lines := map[string]int{}
	table := ""
	n := 0
	for l := range strings.Lines(text) {
		n++
		l = strings.TrimSpace(l)
		if header, ok := strings.CutPrefix(l, "["); ok {
			header, _, _ = strings.Cut(strings.TrimPrefix(header, "["), "]")
			table = plain(header)
			if _, seen := lines[table]; !seen {
				lines[table] = n
			}
			continue
		}
		name, _, ok := strings.Cut(l, "=")
		if !ok || strings.HasPrefix(l, "#") {
			continue
		}
		key := plain(name)
		if table != "" {
			key = table + "." + key
		}
		if _, seen := lines[key]; !seen {
			lines[key] = n
		}
	}
	return func(key string) int { return lines[key] }
}

// plain writes a key as it comes out of the parser: without quotes and blanks.
func plain(key string) string {
	parts := strings.Split(key, ".")
	for i, p := range parts {
		parts[i] = strings.Trim(strings.TrimSpace(p), `"'`)
	}
	return strings.Join(parts, ".")
}
