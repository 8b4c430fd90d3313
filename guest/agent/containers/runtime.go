package containers

import (
	"log/slog"
	"os"
	"runtime"
	"sync"

	_ "github.com/opencontainers/cgroups/devices" // lets libcontainer set device rules
	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // enters namespaces before Go runs
	"github.com/sirupsen/logrus"
)

// The first thread of the process is kept for main's goroutine. libcontainer has threads enter a
// container's mount namespace and lets them end; the first thread cannot end, and would stay
// there: it would keep the container's mounts, and /proc/<pid>/root and mounts would be those of
// the container instead of the guest's.
func init() {
	runtime.LockOSThread()
}

// Init is the second life of the agent's binary: libcontainer runs it again as "init" inside a
// new container, where it sets the container up and becomes its process. It must be the first
// thing that main does when os.Args[1] is "init", and it does not return.
func Init() {
	libcontainer.Init()
}

// IsInit tells whether this process is such a second life.
func IsInit() bool {
	return len(os.Args) > 1 && os.Args[1] == "init"
}

var forwardOnce sync.Once

// forwardLibraryLog sends what libcontainer logs to log. It is set once per process, as the
// library has one global logger.
func forwardLibraryLog(log *slog.Logger) {
	forwardOnce.Do(func() {
		logrus.SetOutput(discard{})
		logrus.SetFormatter(noFormat{})
		logrus.AddHook(logHook{log})
	})
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

type noFormat struct{}

func (noFormat) Format(*logrus.Entry) ([]byte, error) { return nil, nil }

type logHook struct{ log *slog.Logger }

func (logHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h logHook) Fire(e *logrus.Entry) error {
	level := slog.LevelInfo
	switch {
	case e.Level <= logrus.ErrorLevel:
		level = slog.LevelError
	case e.Level == logrus.WarnLevel:
		level = slog.LevelWarn
	case e.Level >= logrus.DebugLevel:
		level = slog.LevelDebug
	}
	args := make([]any, 0, 2*len(e.Data))
	for k, v := range e.Data {
		args = append(args, k, v)
	}
	h.log.Log(e.Context, level, "libcontainer: "+e.Message, args...)
	return nil
}
