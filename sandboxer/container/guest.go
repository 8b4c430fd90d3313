package container

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxMessage bounds what is passed on of an error text that came from the guest, in bytes.
const maxMessage = 1024

// guestError says what could not be done and why, with the error class of the guest's answer. A
// call that ended because the caller or the guest's life did keeps that cause.
func (s *Set) guestError(ctx context.Context, what string, err error) error {
	if ctx.Err() != nil {
		cause := context.Cause(ctx)
		if errors.Is(cause, context.DeadlineExceeded) {
			return fmt.Errorf("cannot %s: the guest did not answer in time: %w", what, cause)
		}
		return fmt.Errorf("cannot %s: %w", what, cause)
	}
	if errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("cannot %s: the connection to the guest is lost: %w", what, errdefs.ErrUnavailable)
	}
	st, fromGuest := status.FromError(err)
	if !fromGuest {
		return fmt.Errorf("cannot %s: %w", what, err)
	}
	message := printable(st.Message())
	if st.Code() == codes.ResourceExhausted && strings.Contains(message, "exceed maximum message size") {
		return fmt.Errorf("cannot %s: %w", what, s.misbehaved(errors.New("its answer is too long: "+message)))
	}
	return fmt.Errorf("cannot %s: %w", what, &answer{message: message, class: class(st.Code())})
}

// answer is an error of the guest: its text for people, our class for programs.
type answer struct {
	message string
	class   error
}

func (a *answer) Error() string { return a.message }
func (a *answer) Unwrap() error { return a.class }

func class(code codes.Code) error {
	switch code {
	case codes.InvalidArgument:
		return errdefs.ErrInvalidArgument
	case codes.NotFound:
		return errdefs.ErrNotFound
	case codes.AlreadyExists:
		return errdefs.ErrAlreadyExists
	case codes.FailedPrecondition:
		return errdefs.ErrFailedPrecondition
	case codes.Unimplemented:
		return errdefs.ErrNotImplemented
	case codes.Unavailable:
		return errdefs.ErrUnavailable
	case codes.PermissionDenied:
		return errdefs.ErrPermissionDenied
	case codes.ResourceExhausted:
		return errdefs.ErrResourceExhausted
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	case codes.Canceled:
		return context.Canceled
	case codes.Internal:
		return errdefs.ErrInternal
	}
	return errdefs.ErrUnknown
}

// printable makes text of the guest fit for logs and terminals.
func printable(text string) string {
	cut := len(text) > maxMessage
	if cut {
		text = text[:maxMessage]
	}
	text = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, " "))
	if cut {
		text += "..."
	}
	return text
}

func (s *Set) checkPID(p *process, pid uint32) error {
	if pid > maxGuestPID {
		return s.misbehaved(fmt.Errorf("it reported process id %d of %v", pid, p))
	}
	return nil
}
