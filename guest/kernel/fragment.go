package kernel

import (
	"bufio"
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A symbol is one line of a configuration: CONFIG_Name with its value as Kconfig writes it (y, 64,
// "text"), or off.
type symbol struct {
	name  string // without CONFIG_
	value string // "" means "is not set"
	since string // the first kernel version that knows the symbol, e.g. "5.18"; "" means any
	// ifKnown leaves the symbol out for a source that does not define it, whatever its version:
	// distributions carry such symbols back to older series, each its own choice.
	ifKnown bool
	where   string // file:line, for errors
}

func (s symbol) String() string {
	if s.value == "" {
		return "# CONFIG_" + s.name + " is not set"
	}
	return "CONFIG_" + s.name + "=" + s.value
}

var (
	setLine   = regexp.MustCompile(`^CONFIG_([A-Za-z0-9_]+)=("(?:[^"\\]|\\.)*"|[A-Za-z0-9_+-]+)(?:\s+#\s*(?:since\s+([0-9]+\.[0-9]+)|(if known)))?$`)
	unsetLine = regexp.MustCompile(`^# CONFIG_([A-Za-z0-9_]+) is not set$`)
)

// parse reads a fragment. A line that looks like a symbol and is none is an error, because Kconfig
// would pass over it in silence.
func parse(name string, data []byte) ([]symbol, error) {
	var symbols []symbol
	lines := bufio.NewScanner(bytes.NewReader(data))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		where := fmt.Sprintf("%s:%d", name, n)
		if m := setLine.FindStringSubmatch(line); m != nil {
			if m[2] == "n" {
				return nil, fmt.Errorf("%s: write %q instead of %q", where, "# CONFIG_"+m[1]+" is not set", line)
			}
			symbols = append(symbols, symbol{name: m[1], value: m[2], since: m[3], ifKnown: m[4] != "", where: where})
			continue
		}
		if m := unsetLine.FindStringSubmatch(line); m != nil {
			symbols = append(symbols, symbol{name: m[1], where: where})
			continue
		}
		if line != "" && (!strings.HasPrefix(line, "#") || strings.HasPrefix(line, "# CONFIG_")) {
			return nil, fmt.Errorf("%s: %q is neither a symbol nor a comment", where, line)
		}
	}
	return symbols, lines.Err()
}

// merge joins fragments for a source of the given version that defines the symbols in known. A
// symbol that stands in two places is an error, whatever its values: the reader of one file must
// be able to trust it.
func merge(version string, known map[string]bool, fragments ...[]symbol) ([]symbol, error) {
	var merged []symbol
	seen := map[string]symbol{}
	for _, fragment := range fragments {
		for _, s := range fragment {
			if before, ok := seen[s.name]; ok {
				return nil, fmt.Errorf("CONFIG_%s stands in %s and again in %s", s.name, before.where, s.where)
			}
			seen[s.name] = s
			if s.since != "" && older(version, s.since) || s.ifKnown && !known[s.name] {
				continue
			}
			merged = append(merged, s)
		}
	}
	return merged, nil
}

// older tells whether kernel version a ("5.10.0-182") is older than b ("5.18").
func older(a, b string) bool {
	return slices.Compare(numbers(a), numbers(b)) < 0
}

var leading = regexp.MustCompile(`^([0-9]+)\.([0-9]+)`)

func numbers(version string) []int {
	m := leading.FindStringSubmatch(version)
	if m == nil {
		return nil
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	return []int{major, minor}
}

// format writes symbols as the file that KCONFIG_ALLCONFIG names.
func format(symbols []symbol) []byte {
	var b bytes.Buffer
	for _, s := range symbols {
		fmt.Fprintln(&b, s)
	}
	return b.Bytes()
}

// lost returns the requested symbols that the .config made by Kconfig does not honour, each with
// what it has instead.
func lost(requested []symbol, config []byte) ([]string, error) {
	got := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(config))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), "=")
		if ok && strings.HasPrefix(name, "CONFIG_") {
			got[strings.TrimPrefix(name, "CONFIG_")] = value
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	var missing []string
	for _, s := range requested {
		if has := got[s.name]; has != s.value {
			if has == "" {
				has = "not set"
			}
			missing = append(missing, fmt.Sprintf("%q (%s) is %s", s.String(), s.where, has))
		}
	}
	return missing, nil
}
