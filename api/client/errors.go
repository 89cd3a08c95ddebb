package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// Error is the server's refusal of a request.
type Error struct {
	Status    int    // of HTTP
	Code      string // the error's word, for example "VOLUME_ALREADY_EXISTS"
	Message   string // for a human
	RequestID string // names the request in the server's log
}

func (e *Error) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("%s (%d)", e.Code, e.Status)
	}
	return e.Message
}

// maxErrorBody bounds what is read of a refusal.
const maxErrorBody = 64 << 10

func readError(resp *http.Response) error {
	e := &Error{Status: resp.StatusCode, RequestID: resp.Header.Get("X-Request-Id")}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	var body struct {
		Error   string `json:"error"`
		Message string `json:"message"`
	}
	if err == nil && json.Unmarshal(b, &body) == nil {
		e.Code, e.Message = body.Error, body.Message
	}
	if e.Code == "" {
		e.Code = http.StatusText(resp.StatusCode)
	}
	return e
}

// Status tells the HTTP status of a refusal, 0 for every other error.
func Status(err error) int {
	var e *Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}

// IsNotFound reports whether the server says that the object is not there.
func IsNotFound(err error) bool { return Status(err) == http.StatusNotFound }

// IsConflict reports whether the object's state forbids what was asked.
func IsConflict(err error) bool { return Status(err) == http.StatusConflict }
