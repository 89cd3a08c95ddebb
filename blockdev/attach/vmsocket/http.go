package vmsocket

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

const (
	// answerTime bounds one question: a VMM that is well answers in milliseconds.
	answerTime = 10 * time.Second
	// longestAnswer bounds what is read of an answer, in bytes: the state of a VM
	// with many devices is long.
	longestAnswer = 4 << 20
)

// ErrGarbled is an answer that is none of the API's.
var ErrGarbled = errors.New("the answer is not what the API's is")

// Refused is an answer of a VMM's API that is not success. Its text names the
// request and the status only: what the VMM says may name paths of this host, and
// goes to the operator's log.
type Refused struct {
	Request string
	Status  int
}

func (r *Refused) Error() string {
	return fmt.Sprintf("the VMM answers %d to %s", r.Status, r.Request)
}

// Do asks the VMM of a resolved target over HTTP. in is sent as JSON unless nil; the
// answer is read into out unless nil or empty. *Refused for an answer other than 2xx.
// blockdev.ErrGone when the VMM has ended. Every other error, a time-out among them
// (10 s, or ctx), leaves unknown whether the VMM has done it.
func (d *Door) Do(ctx context.Context, t attach.Target, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	request, err := newRequest(ctx, method, path, in)
	if err != nil {
		return err
	}
	client := http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DisableKeepAlives: true, // each request asks again who listens
			DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return d.Dial(ctx, t) },
		},
	}
	answer, err := client.Do(request)
	if err != nil {
		return d.broken(ctx, t, request, err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, longestAnswer+1))
	switch {
	case err != nil:
		return d.broken(ctx, t, request, err)
	case len(text) > longestAnswer:
		return fmt.Errorf("%s %s: %w: it is longer than %d bytes", method, path, ErrGarbled, longestAnswer)
	case answer.StatusCode < 200 || answer.StatusCode > 299:
		d.log.Info("a VMM refused", "pid", t.Pid, "request", method+" "+path, "status", answer.StatusCode, "answer", string(text[:min(len(text), 500)]))
		return &Refused{Request: method + " " + path, Status: answer.StatusCode}
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("%s %s: %w: %w", method, path, ErrGarbled, err)
	}
	return nil
}

// NotA says of a first question that has failed what a caller can do about it:
// blockdev.ErrInvalid when something else than the VMM of that name answers,
// blockdev.ErrBusy when nobody does.
func NotA(name string, err error) error {
	var refused *Refused
	switch {
	case err == nil, errors.Is(err, blockdev.ErrGone), errors.Is(err, blockdev.ErrBusy), errors.Is(err, blockdev.ErrInvalid):
		return err
	case errors.As(err, &refused), errors.Is(err, ErrGarbled):
		return invalid("what listens on the socket does not answer as %s does: %w", name, err)
	}
	return fmt.Errorf("%w: %w", blockdev.ErrBusy, err)
}

func newRequest(ctx context.Context, method, path string, in any) (*http.Request, error) {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(text)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, body)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/json")
	if in != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	return request, nil
}

// broken tells why there is no answer: the VMM's end explains any of it.
func (d *Door) broken(ctx context.Context, t attach.Target, request *http.Request, err error) error {
	p, gone := d.Open(t)
	if gone != nil {
		return gone
	}
	defer p.Close()
	if gone := p.Gone(ctx); gone != nil {
		return gone
	}
	if u := (*url.Error)(nil); errors.As(err, &u) {
		err = u.Err
	}
	if errors.Is(err, blockdev.ErrBusy) || errors.Is(err, blockdev.ErrInvalid) {
		return err
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("%s %s: the VMM has not answered: %w", request.Method, request.URL.Path, err)
}
