package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
)

// The exit codes of holdfastd; its help documents them. 2 is none of them: the
// runtime ends with it after a panic, and after the SIGABRT of systemd's
// watchdog, and then the daemon is to be started again.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 78 // EX_CONFIG of sysexits.h
	exitHeld    = 3
	exitHost    = 4
	exitStorage = 70 // EX_SOFTWARE of sysexits.h
)

// ErrHost means that this host lacks something that the daemon needs.
var ErrHost = errors.New("this host lacks what the daemon needs")

var errUsage = errors.New("usage")

// usageErr marks an error of the command line or the configuration.
type usageErr struct{ err error }

func (u usageErr) Error() string   { return u.err.Error() }
func (u usageErr) Unwrap() []error { return []error{errUsage, u.err} }

// Usage marks err as the operator's mistake; nil stays nil.
func Usage(err error) error {
	if err == nil {
		return nil
	}
	return usageErr{err}
}

// ExitCode is what the process ends with.
func ExitCode(err error) int {
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.Is(err, ErrHeld):
		return exitHeld
	case errors.Is(err, ErrHost):
		return exitHost
	}
	return exitFailure
}

// failStop ends the process at once: after a lost write nothing that it still
// does could be believed, and a new process finds out what is durable.
func failStop(log *slog.Logger) func(error) {
	return func(err error) {
		log.LogAttrs(context.Background(), slog.LevelError, "storage failed: ending the process", slog.Any("cause", err))
		os.Exit(exitStorage)
	}
}
