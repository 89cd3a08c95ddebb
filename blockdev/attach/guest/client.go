package guest

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
)

var (
	// ErrSilent: nobody answers, or not any more. Whether the request was carried
	// out, or will be, is not known.
	ErrSilent = errors.New("the agent in the guest does not answer")
	// ErrNonsense: what answers keeps to no rule of the protocol.
	ErrNonsense = errors.New("what answers in the guest is not the agent")
)

const (
	// mostBytes bounds what is read for one request: a whole answer after one of an
	// earlier connection, and room for its signs of life.
	mostBytes = 4 * LongestLine
	// mostWords and mostHolders bound what is shown of a guest's words.
	mostWords   = 160
	mostHolders = 8
)

// Refused is a request that the agent did not carry out.
type Refused struct {
	Do      string
	Code    string // one of the codes
	text    string
	holders []Holder
}

// Error shows the guest's words in quotes, cut short.
func (r *Refused) Error() string {
	var b strings.Builder
	switch r.Code {
	case CodeBusy:
		b.WriteString("it is in use in the guest")
	case CodeNotFound:
		b.WriteString("the guest has no such disk")
	case CodeNotMounted:
		b.WriteString("it is not mounted in the guest")
	case CodeUnsupported:
		fmt.Fprintf(&b, "the guest cannot %s it", r.Do)
	case CodeInvalid:
		fmt.Fprintf(&b, "the agent in the guest does not take the request to %s", r.Do)
	default:
		fmt.Fprintf(&b, "%s failed in the guest", r.Do)
	}
	for n, h := range r.holders[:min(len(r.holders), mostHolders)] {
		b.WriteString([]string{" by process ", ", "}[min(n, 1)] + strconv.Itoa(h.Pid))
		if h.Name != "" {
			fmt.Fprintf(&b, " (%s)", words(h.Name, 32))
		}
	}
	if r.text != "" {
		b.WriteString(": " + words(r.text, mostWords))
	}
	return b.String()
}

// words quotes what a guest says.
func words(text string, most int) string {
	text = strings.Map(func(c rune) rune {
		if c == unicode.ReplacementChar || !unicode.IsPrint(c) {
			return '.'
		}
		return c
	}, text)
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return strconv.Quote(text)
}

// Ask sends a request over a connection that nobody else uses and gives the answer.
// *Refused when the agent says why not; ErrSilent when nothing comes for a time of
// patience, or ctx ends; ErrNonsense when something else answers. The request gets
// a number of its own.
func Ask(ctx context.Context, conn net.Conn, patience time.Duration, request Request) (Answer, error) {
	request.ID = rand.Text()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	wait := func() {
		_ = conn.SetDeadline(time.Now().Add(patience))
		if ctx.Err() != nil { // it ended before the deadline was set
			_ = conn.SetDeadline(time.Unix(1, 0))
		}
	}
	wait()
	// The line's end that comes first ends what an earlier connection may have left.
	if _, err := conn.Write([]byte{'\n'}); err != nil {
		return Answer{}, silent(ctx, patience, err)
	}
	if err := write(conn, request); err != nil {
		return Answer{}, silent(ctx, patience, err)
	}
	r := bufio.NewReaderSize(conn, 4096)
	for read := 0; ; {
		text, err := Line(r)
		switch {
		case errors.Is(err, errLong):
			return Answer{}, fmt.Errorf("%w: %w", ErrNonsense, err)
		case err != nil:
			return Answer{}, silent(ctx, patience, err)
		}
		if read += len(text); read > mostBytes {
			return Answer{}, fmt.Errorf("%w: it says more than %d bytes", ErrNonsense, mostBytes)
		}
		var a Answer
		if json.Unmarshal(text, &a) != nil || a.ID != request.ID {
			continue // of an earlier request; the deadline stands
		}
		if a.Working {
			wait()
			continue
		}
		if a.Failure != nil {
			return Answer{}, refused(request.Do, *a.Failure)
		}
		return a, nil
	}
}

func silent(ctx context.Context, patience time.Duration, err error) error {
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%w in the time that there is: %w", ErrSilent, context.Cause(ctx))
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w within %s", ErrSilent, patience)
	}
	if op := (*net.OpError)(nil); errors.As(err, &op) { // without the socket's name
		err = op.Err
	}
	return fmt.Errorf("%w: %w", ErrSilent, err)
}

func refused(do string, f Failure) error {
	switch f.Code {
	case CodeInvalid, CodeNotFound, CodeNotMounted, CodeBusy, CodeUnsupported, CodeFailed:
	default:
		return fmt.Errorf("%w: it fails with a code that there is not", ErrNonsense)
	}
	for n := range f.Holders {
		if f.Holders[n].Pid < 1 {
			f.Holders = f.Holders[:n]
			break
		}
	}
	return &Refused{Do: do, Code: f.Code, text: f.Text, holders: f.Holders}
}

// Connect speaks what stands before a guest's port behind the socket of a hybrid
// vsock, as Firecracker and Cloud Hypervisor have it (docs/vsock.md of both):
// "CONNECT port", "OK port-of-this-side".
func Connect(ctx context.Context, conn net.Conn, patience time.Duration, port uint32) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if ctx.Err() != nil {
		return silent(ctx, patience, ctx.Err())
	}
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return silent(ctx, patience, err)
	}
	// Byte by byte: what follows the line is the guest's.
	var line []byte
	for one := make([]byte, 1); ; {
		if _, err := conn.Read(one); err != nil {
			return silent(ctx, patience, err)
		}
		if one[0] == '\n' {
			break
		}
		if line = append(line, one[0]); len(line) > 32 {
			return fmt.Errorf("%w: the socket is no hybrid vsock", ErrNonsense)
		}
	}
	if number, ok := strings.CutPrefix(string(line), "OK "); ok {
		if _, err := strconv.ParseUint(number, 10, 32); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%w: the socket is no hybrid vsock", ErrNonsense)
}
