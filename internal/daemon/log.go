package daemon

import (
	"fmt"
	"io"
	"log/slog"

	"holdfast/internal/preflight"
)

// newLog makes the daemon's log. systemd's journal adds its own times, but a
// log that is read elsewhere needs them, so they stay.
func newLog(c Config, w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return nil, fmt.Errorf("log_level: %w", err)
	}
	o := &slog.HandlerOptions{Level: level}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return slog.New(slog.NewTextHandler(w, o)), nil
}

// logChecks says each thing that is missing, and what follows from it.
func logChecks(log *slog.Logger, checks []preflight.Check) {
	for _, c := range checks {
		level := slog.LevelDebug
		switch c.Status {
		case preflight.Warn:
			level = slog.LevelWarn
		case preflight.Fail:
			level = slog.LevelError
		case preflight.OK:
		}
		log.Log(nil, level, "preflight", "check", c.Name, "found", c.Found, "consequence", c.Consequence, "fix", c.Fix) //nolint:staticcheck // the handlers use no context
	}
}
