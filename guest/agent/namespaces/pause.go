package namespaces

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// Pause is the life of the pause process: it reaps what is left to it and never returns. In a
// build with cgo the process does not come this far, see pause_cgo.go.
func Pause() {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if pid <= 0 || err != nil {
				break
			}
		}
		<-children
	}
}
