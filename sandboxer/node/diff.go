package node

import (
	"fmt"
	"strings"
)

// contextLines is how many lines that did not change a diff shows around those that did.
const contextLines = 3

// unified returns the differences between two texts as diff -u prints them, nothing if there are
// none. An empty name stands for a file that does not exist.
func unified(oldName, newName, old, new string) string {
	if old == new {
		return ""
	}
	a, b := splitLines(old), splitLines(new)
	ops := compare(a, b)
	var out strings.Builder
	fmt.Fprintf(&out, "--- %s\n+++ %s\n", orNull(oldName), orNull(newName))
	for start := 0; start < len(ops); {
		if ops[start].kind == ' ' {
			start++
			continue
		}
		// A hunk ends where more unchanged lines follow than two contexts hold.
		end, same := start, 0
		for i := start; i < len(ops) && same <= 2*contextLines; i++ {
			if ops[i].kind == ' ' {
				same++
			} else {
				same, end = 0, i
			}
		}
		first, last := max(0, start-contextLines), min(len(ops), end+1+contextLines)
		hunk := ops[first:last]
		var removed, added int
		for _, op := range hunk {
			if op.kind != '+' {
				removed++
			}
			if op.kind != '-' {
				added++
			}
		}
		fmt.Fprintf(&out, "@@ -%s +%s @@\n", span(hunk[0].a, removed), span(hunk[0].b, added))
		for _, op := range hunk {
			out.WriteByte(op.kind)
			out.WriteString(op.line)
			if !strings.HasSuffix(op.line, "\n") {
				out.WriteString("\n\\ No newline at end of file\n")
			}
		}
		start = last
	}
	return out.String()
}

func orNull(name string) string {
	if name == "" {
		return "/dev/null"
	}
	return name
}

// span is the place of n lines that begin behind the first line lines.
func span(line, n int) string {
	if n == 0 {
		return fmt.Sprintf("%d,0", line)
	}
	if n == 1 {
		return fmt.Sprint(line + 1)
	}
	return fmt.Sprintf("%d,%d", line+1, n)
}

func splitLines(s string) []string {
	lines := strings.SplitAfter(s, "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}

// edit is a line that stays, goes or comes, with how many lines of either text are before it.
type edit struct {
	kind byte // ' ', '-', '+'
	line string
	a, b int
}

// compare aligns two texts by their longest common subsequence of lines. The texts are
// configuration files; what begins and ends alike, which is nearly all, is set aside first.
func compare(a, b []string) []edit {
	var ops []edit
	i, j := 0, 0
	keep := func() {
		ops = append(ops, edit{' ', a[i], i, j})
		i, j = i+1, j+1
	}
	for i < len(a) && j < len(b) && a[i] == b[j] {
		keep()
	}
	endA, endB := len(a), len(b)
	for endA > i && endB > j && a[endA-1] == b[endB-1] {
		endA, endB = endA-1, endB-1
	}
	// common[x][y] is the length of the longest common subsequence of what follows.
	baseA, baseB := i, j
	common := make([][]int, endA-baseA+1)
	for x := range common {
		common[x] = make([]int, endB-baseB+1)
	}
	for x := endA - baseA - 1; x >= 0; x-- {
		for y := endB - baseB - 1; y >= 0; y-- {
			if a[baseA+x] == b[baseB+y] {
				common[x][y] = common[x+1][y+1] + 1
			} else {
				common[x][y] = max(common[x+1][y], common[x][y+1])
			}
		}
	}
	for i < endA || j < endB {
		x, y := i-baseA, j-baseB
		switch {
		case i < endA && j < endB && a[i] == b[j]:
			keep()
		case j == endB || i < endA && common[x+1][y] >= common[x][y+1]:
			ops = append(ops, edit{'-', a[i], i, j})
			i++
		default:
			ops = append(ops, edit{'+', b[j], i, j})
			j++
		}
	}
	for i < len(a) {
		keep()
	}
	return ops
}
