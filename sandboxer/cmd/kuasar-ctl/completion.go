package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"slices"
	"strings"
)

func completion(c *call, _ *flag.FlagSet) func(context.Context, []string) error {
	return func(_ context.Context, args []string) error {
		if args[0] != "bash" {
			return usagef("completion: there is no completion for %q; it is bash", args[0])
		}
		if c.json() {
			return usagef("completion: a script has no JSON; use -o text")
		}
		_, err := c.out.Write(bashCompletion())
		return err
	}
}

// flagFiles are the flags whose values are files or directories.
var flagFiles = map[string]string{"config": "-f", "listen": "-f", "dir": "-d"}

// bashCompletion is the script for bash, made from the table of commands. It is shipped as
// defaults/kuasar-ctl.bash.
func bashCompletion() []byte {
	var b bytes.Buffer
	var names []string
	var options, operands, values strings.Builder
	var valued []string // flags that take a value
	for _, cmd := range commands() {
		names = append(names, cmd.name)
		f, _ := cmd.flags(&call{})
		var flags []string
		f.VisitAll(func(fl *flag.Flag) {
			name := dashes(fl.Name)
			flags = append(flags, name)
			if isBool(fl) {
				return
			}
			if fl.Name != "dir" && !slices.Contains(valued, name) {
				valued = append(valued, name)
			}
			if !slices.Contains([]string{"o", "dir"}, fl.Name) && flagFiles[fl.Name] == "" {
				fmt.Fprintf(&values, "            %s:%s) return ;;\n", cmd.name, name)
			}
		})
		fmt.Fprintf(&options, "        %s) options=%q ;;\n", cmd.name, strings.Join(flags, " "))
		switch {
		case cmd.operand == "pod":
			fmt.Fprintf(&operands, "        %s) words=$(kuasar-ctl ${dir:+--dir \"$dir\"} list -q 2>/dev/null) ;;\n", cmd.name)
		case cmd.operand != "":
			fmt.Fprintf(&operands, "        %s) words=%q ;;\n", cmd.name, strings.ReplaceAll(cmd.operand, "|", " "))
		}
	}
	names = append(names, "help")
	fmt.Fprintf(&operands, "        help) words=%q ;;\n", strings.Join(names[:len(names)-1], " "))
	fmt.Fprintf(&b, `# Completion of kuasar-ctl for bash; "kuasar-ctl completion bash" prints it.
_kuasar_ctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    local command= operand= dir= words= options= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            --dir|-dir) dir=${COMP_WORDS[++i]} ;;
            %s) ((i++)) ;;
            -*) ;;
            *) if [[ -z $command ]]; then command=${COMP_WORDS[i]}; else operand=1; fi ;;
        esac
    done
    COMPREPLY=()
    case $prev in
        -o) COMPREPLY=($(compgen -W "text json" -- "$cur")); return ;;
        --dir|-dir) COMPREPLY=($(compgen -d -- "$cur")); return ;;
        --config|--listen) COMPREPLY=($(compgen -f -- "$cur")); return ;;
    esac
    case $command:$prev in
%s    esac
    if [[ -z $command ]]; then
        COMPREPLY=($(compgen -W "%s --dir -o --version --help" -- "$cur"))
        return
    fi
    case $command in
%s    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$options --help" -- "$cur"))
        return
    fi
    if [[ -n $operand ]]; then
        return
    fi
    case $command in
%s    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -F _kuasar_ctl kuasar-ctl
`, strings.Join(valued, "|"), strings.ReplaceAll(values.String(), "            ", "        "), strings.Join(names, " "), options.String(), operands.String())
	return b.Bytes()
}

// dashes is a flag as it is documented: one dash for a letter, two for a word.
func dashes(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

func isBool(f *flag.Flag) bool {
	b, ok := f.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}
