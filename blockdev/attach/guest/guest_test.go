package guest

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// against asks a stranger, which is given the request and the connection.
func against(t *testing.T, patience time.Duration, stranger func(Request, net.Conn)) (Answer, error) {
	t.Helper()
	here, there := net.Pipe()
	defer here.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer there.Close()
		_ = Requests(there, func(r Request) { stranger(r, there) })
	}()
	defer func() { here.Close(); <-done }()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	return Ask(ctx, here, patience, Request{Do: Stat, Serial: "abc"})
}

func say(conn net.Conn, text string) { _, _ = io.WriteString(conn, text) }

func line(a Answer) string {
	b, _ := json.Marshal(a)
	return string(b) + "\n"
}

func TestAsk(t *testing.T) {
	a, err := against(t, time.Minute, func(r Request, conn net.Conn) {
		say(conn, "left over of another\n"+line(Answer{ID: "another's", Size: 9})+line(Answer{ID: r.ID, Working: true})+line(Answer{ID: r.ID, Size: 7}))
	})
	if err != nil || a.Size != 7 {
		t.Errorf("%+v, %v", a, err)
	}
}

// TestStrangers: whatever answers instead of the agent, or does not, is told for what
// it is, in bounded time and memory.
func TestStrangers(t *testing.T) {
	for name, c := range map[string]struct {
		want error
		text string
		say  func(Request, net.Conn)
	}{
		"silence":        {ErrSilent, "within", func(Request, net.Conn) {}},
		"an end":         {ErrSilent, "", func(_ Request, conn net.Conn) { conn.Close() }},
		"other numbers":  {ErrSilent, "", func(_ Request, conn net.Conn) { say(conn, line(Answer{ID: "x", Size: 1})) }},
		"a long line":    {ErrNonsense, "too long", func(_ Request, conn net.Conn) { say(conn, strings.Repeat("x", 2*LongestLine)) }},
		"endless lines":  {ErrNonsense, "more than", func(_ Request, conn net.Conn) { say(conn, strings.Repeat("xxxxxxx\n", LongestLine)) }},
		"a strange code": {ErrNonsense, "code", func(r Request, conn net.Conn) { say(conn, line(Answer{ID: r.ID, Failure: &Failure{Code: "rm -rf"}})) }},
	} {
		t.Run(name, func(t *testing.T) {
			patience := time.Minute
			if errors.Is(c.want, ErrSilent) {
				patience = 100 * time.Millisecond
			}
			if _, err := against(t, patience, c.say); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestForEver: one that says that it is at work gets as long as its caller has, and
// no longer.
func TestForEver(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		n := 0
		_ = Requests(there, func(r Request) {
			for ; there.SetDeadline(time.Now().Add(time.Second)) == nil; n++ {
				if _, err := io.WriteString(there, line(Answer{ID: r.ID, Working: true})); err != nil {
					return
				}
				if n == 20 {
					cancel()
				}
			}
		})
	}()
	// What it says before the end of its caller's time may be too much as well.
	if _, err := Ask(ctx, here, time.Second, Request{Do: Trim}); !errors.Is(err, ErrSilent) && !errors.Is(err, ErrNonsense) {
		t.Errorf("%v", err)
	}
}

// TestWords: what a guest says is shown in quotes, cut short, and harmless.
func TestWords(t *testing.T) {
	_, err := against(t, time.Minute, func(r Request, conn net.Conn) {
		say(conn, line(Answer{ID: r.ID, Failure: &Failure{Code: CodeBusy, Text: "\x1b[31mred\n" + strings.Repeat("y", 4000), Holders: []Holder{{Pid: 7, Name: "a\x00b"}, {Pid: -1, Name: "no"}, {Pid: 8}}}}))
	})
	var refused *Refused
	if !errors.As(err, &refused) || refused.Code != CodeBusy {
		t.Fatalf("%v", err)
	}
	text := err.Error()
	if strings.ContainsAny(text, "\x1b\n\x00") || len(text) > 400 || !strings.Contains(text, "process 7") || strings.Contains(text, "8") {
		t.Errorf("%q", text)
	}
}

func TestConnect(t *testing.T) {
	for answer, ok := range map[string]bool{
		"OK 1073741824\n": true, "OK \n": false, "NO\n": false, "OK 99999999999\n": false, strings.Repeat("O", 100): false, "": false,
	} {
		here, there := net.Pipe()
		go func() {
			b := make([]byte, 64)
			_, _ = there.Read(b)
			say(there, answer)
		}()
		patience := time.Minute
		if answer == "" {
			patience = 100 * time.Millisecond
		}
		if err := Connect(t.Context(), here, patience, VsockPort); (err == nil) != ok {
			t.Errorf("%q: %v", answer, err)
		}
		here.Close()
		there.Close()
	}
}

// FuzzLines: a stream of anything gives requests with numbers, and ends.
func FuzzLines(f *testing.F) {
	f.Add(`{"id":"1","do":"hello"}` + "\n")
	f.Add(strings.Repeat("x", LongestLine+5) + "\n{\"id\":\"2\"}\n")
	f.Fuzz(func(t *testing.T, stream string) {
		err := Requests(strings.NewReader(stream), func(r Request) {
			if r.ID == "" || len(r.ID) > longestID {
				t.Errorf("a request with the number %q", r.ID)
			}
		})
		if !errors.Is(err, io.EOF) {
			t.Errorf("the stream ends with %v", err)
		}
	})
}
