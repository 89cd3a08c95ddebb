package engine

import (
	"errors"
	"fmt"
)

// Sentinels, matched by errors.Is. api has one table from these to HTTP.
var (
	ErrNotFound    = errors.New("not found")                          // 404
	ErrExists      = errors.New("already exists")                     // 409
	ErrConflict    = errors.New("conflicts with the state")           // 409
	ErrAttached    = errors.New("volume is attached")                 // 409
	ErrInvalid     = errors.New("invalid request")                    // 400
	ErrQuota       = errors.New("quota exceeded")                     // 403
	ErrNoSpace     = errors.New("pool is full")                       // 403
	ErrUnsupported = errors.New("not supported here")                 // 409
	ErrHanging     = errors.New("a step hangs in the kernel")         // 409
	ErrCannotFence = errors.New("the old holder could go on writing") // 409
	ErrUnavailable = errors.New("service is stopping or failed")      // 503
)

// Problem is an error that a user can act on.
type Problem struct {
	Kind    error  // one of the sentinels
	Field   string // of the request, for example "spec.size"; may be empty
	Message string // what is wrong and what to do
	Err     error  // the cause, may be nil
}

func (p *Problem) Error() string {
	if p.Field != "" {
		return p.Field + ": " + p.Message
	}
	return p.Message
}

// Unwrap lets errors.Is match the kind and the cause.
func (p *Problem) Unwrap() []error {
	if p.Err == nil {
		return []error{p.Kind}
	}
	return []error{p.Kind, p.Err}
}

func problem(kind error, field, format string, args ...any) *Problem {
	return &Problem{Kind: kind, Field: field, Message: fmt.Sprintf(format, args...)}
}
