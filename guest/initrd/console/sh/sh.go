// The command sh is the shell of the debug console. It runs each line as it arrives, whether it
// comes from a terminal, a socket or a pipe, and writes nothing that a plain reader of its output
// would have to filter out.
//
//	sh            read commands from the standard input; prompt if that is a terminal
//	sh -i         the same, and always prompt
//	sh -c TEXT    run TEXT
//	sh FILE       run a script
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"golang.org/x/term"
	"mvdan.cc/sh/v3/interp"
	"mvdan.cc/sh/v3/syntax"
)

var (
	command     = flag.String("c", "", "run this text instead of the standard input")
	interactive = flag.Bool("i", false, "prompt even if the standard input is no terminal")
)

func main() {
	flag.Parse()
	status, err := run()
	if err != nil {
		fmt.Fprintf(os.Stderr, "sh: %v\n", err)
	}
	os.Exit(status)
}

// run returns the exit status of the last command.
func run() (int, error) {
	runner, err := interp.New(interp.StdIO(os.Stdin, os.Stdout, os.Stderr))
	if err != nil {
		return 2, err
	}
	switch {
	case *command != "":
		return script(runner, strings.NewReader(*command), "-c", flag.Args()...)
	case flag.NArg() > 0:
		file, err := os.Open(flag.Arg(0))
		if err != nil {
			return 127, err
		}
		defer file.Close()
		return script(runner, file, flag.Arg(0), flag.Args()[1:]...)
	}
	// An interrupt is meant for the command that runs, not for the shell. The signal is caught and
	// not ignored, because children would inherit that.
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, os.Interrupt)
	prompt := *interactive || term.IsTerminal(int(os.Stdin.Fd()))
	return lines(runner, oneByte{os.Stdin}, os.Stdout, os.Stderr, prompt)
}

func script(runner *interp.Runner, r io.Reader, name string, args ...string) (int, error) {
	program, err := syntax.NewParser().Parse(r, name)
	if err != nil {
		return 2, err
	}
	// "--" keeps arguments that look like options from being taken for the shell's.
	if err := interp.Params(append([]string{"--"}, args...)...)(runner); err != nil {
		return 2, err
	}
	return status(runner.Run(context.Background(), program))
}

// lines runs complete lines until the input ends or the shell exits. A line that is no shell
// syntax is reported, and the next is read.
func lines(runner *interp.Runner, r io.Reader, stdout, stderr io.Writer, prompt bool) (int, error) {
	say := func(text string) {
		if prompt {
			fmt.Fprint(stdout, text)
		}
	}
	last := 0
	for {
		parser := syntax.NewParser()
		exited := false
		say("# ")
		err := parser.Interactive(r, func(statements []*syntax.Stmt) bool {
			if parser.Incomplete() {
				say("> ")
				return true
			}
			for _, s := range statements {
				var err error
				if last, err = status(runner.Run(context.Background(), s)); err != nil {
					fmt.Fprintf(stderr, "sh: %v\n", err)
				}
				if runner.Exited() {
					exited = true
					return false
				}
			}
			say("# ")
			return true
		})
		var mistake syntax.ParseError
		switch {
		case exited:
			return last, nil
		case errors.As(err, &mistake):
			fmt.Fprintf(stderr, "sh: %v\n", err)
			last = 2
		case err != nil:
			return 2, err
		default:
			return last, nil
		}
	}
}

// status splits what the interpreter returns into an exit status and an error of the shell's own.
func status(err error) (int, error) {
	if err == nil {
		return 0, nil
	}
	if code, ok := interp.IsExitStatus(err); ok {
		return int(code), nil
	}
	return 1, err
}

// oneByte reads byte by byte, so that what follows a line is left to the command in that line.
type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return o.r.Read(p[:1])
}
