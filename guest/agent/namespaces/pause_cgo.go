//go:build cgo

package namespaces

/*
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

// The pause process has nothing to do but to be there and to reap, and it lives as long as the
// pod. It runs before the Go runtime starts, so that it costs some pages instead of megabytes and
// is there at once. As init of its namespace it is sent no signal that it has not asked for.
__attribute__((constructor)) static void pause_process(int argc, char **argv)
{
	if (argc != 2 || strcmp(argv[0], "pause") != 0 || strcmp(argv[1], "pause") != 0)
		return;
	sigset_t children;
	sigemptyset(&children);
	sigaddset(&children, SIGCHLD);
	sigprocmask(SIG_BLOCK, &children, NULL);
	for (;;) {
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		sigwaitinfo(&children, NULL);
	}
}
*/
import "C"
