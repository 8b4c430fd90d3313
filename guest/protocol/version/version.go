// Package version says which build this is. Host and guest import it, so that both name the same
// version in --version, in the log, and in the agent's hello.
package version

// Version and Commit are set by the build with -ldflags -X. Without it, as in "go test", they say
// that nobody stamped the binary.
var (
	Version = "unstamped"
	Commit  = ""
)

// String returns the version and, where the build knows it, the commit: "1.2.0 (3f2a91c)".
func String() string {
	if Commit == "" {
		return Version
	}
	return Version + " (" + Commit + ")"
}
