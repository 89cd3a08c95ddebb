package vmguest_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/guest"
	"holdfast/blockdev/attach/vmguest"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/internal/sys"
)

const size = 64 << 20

// peer answers each connection to a socket as one of the tests says, and gives a
// request to the agent behind it.
func peer(t *testing.T, answer func(conn net.Conn, r guest.Request)) (*vmguest.Agents, attach.Request) {
	t.Helper()
	dir, err := os.MkdirTemp("", "peer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "agent")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_ = guest.Requests(bufio.NewReader(conn), func(r guest.Request) { answer(conn, r) })
			}()
		}
	}()
	door, err := vmsocket.New([]string{dir}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	start, err := sys.StartTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	boot, err := sys.BootID()
	if err != nil {
		t.Fatal(err)
	}
	serial := func(attach.Request) (string, error) { return "serial", nil }
	return &vmguest.Agents{Door: door, Serial: serial, Patience: time.Minute}, attach.Request{
		Volume: "vol-06c8qk4g1h6s9tj2m0a4n7v000", Endpoint: blockdev.Endpoint{Size: size},
		Target: attach.Target{Agent: socket, Pid: os.Getpid(), StartTime: start, Boot: boot},
	}
}

func say(conn net.Conn, r guest.Request, text string) {
	fmt.Fprintln(conn, strings.ReplaceAll(text, "ID", r.ID))
}

// TestHostileAgent: whatever a guest says, or does not, the host's question ends in
// its time with an error that can be told.
func TestHostileAgent(t *testing.T) {
	for what, answer := range map[string]func(net.Conn, guest.Request){
		"silence":             func(net.Conn, guest.Request) {},
		"a closed connection": func(conn net.Conn, _ guest.Request) { conn.Close() },
		"endless output": func(conn net.Conn, _ guest.Request) {
			for line := []byte(strings.Repeat("x", 1000) + "\n"); ; {
				if _, err := conn.Write(line); err != nil {
					return
				}
			}
		},
		"an endless line": func(conn net.Conn, _ guest.Request) {
			for part := []byte(strings.Repeat("x", 1000)); ; {
				if _, err := conn.Write(part); err != nil {
					return
				}
			}
		},
		"a slow loris": func(conn net.Conn, _ guest.Request) {
			for {
				if _, err := conn.Write([]byte{' '}); err != nil {
					return
				}
				time.Sleep(time.Millisecond)
			}
		},
		"endless work": func(conn net.Conn, r guest.Request) {
			for {
				text, _ := json.Marshal(guest.Answer{ID: r.ID, Working: true})
				if _, err := conn.Write(append(text, '\n')); err != nil {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		},
		"another request's answer": func(conn net.Conn, _ guest.Request) { fmt.Fprintln(conn, `{"id":"other"}`) },
		"a code that there is not": func(conn net.Conn, r guest.Request) { say(conn, r, `{"id":"ID","failure":{"code":"weird"}}`) },
		"no numbers":               func(conn net.Conn, r guest.Request) { say(conn, r, `{"id":"ID"}`) },
		"negative numbers": func(conn net.Conn, r guest.Request) {
			say(conn, r, `{"id":"ID","usage":{"total":-1,"used":-2,"free":-3}}`)
		},
		"more than the device has": func(conn net.Conn, r guest.Request) {
			say(conn, r, `{"id":"ID","usage":{"total":9000000000000000000,"used":1,"free":1}}`)
		},
		"numbers beyond all": func(conn net.Conn, r guest.Request) {
			say(conn, r, `{"id":"ID","usage":{"total":99999999999999999999999999,"used":1,"free":1}}`)
		},
	} {
		t.Run(what, func(t *testing.T) {
			a, r := peer(t, answer)
			a.Patience = 200 * time.Millisecond
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, _, err := a.StatInside(ctx, r)
			if !errors.Is(err, attach.ErrGuestSilent) || !errors.Is(err, blockdev.ErrBusy) {
				t.Errorf("%v", err)
			}
			if len(err.Error()) > 400 || strings.Contains(err.Error(), "/") {
				t.Errorf("it is told as %q", err)
			}
		})
	}
}

// TestTrimThatDoesNotGetOn is refused: its caller would ask for ever.
func TestTrimThatDoesNotGetOn(t *testing.T) {
	for _, said := range []string{
		`{"next":0,"discarded":0}`, `{"next":4096,"discarded":0}`, `{"next":1099511627776,"discarded":0}`, `{"next":8192,"discarded":1099511627776}`, `{"next":8192,"discarded":-1}`,
	} {
		a, r := peer(t, func(conn net.Conn, r guest.Request) { say(conn, r, `{"id":"ID","trim":`+said+`}`) })
		if got, err := a.TrimInside(t.Context(), r, 4096, 4096); !errors.Is(err, attach.ErrGuestSilent) {
			t.Errorf("%s is taken for %+v, %v", said, got, err)
		}
	}
}

// TestWordsOfAGuest are shown in quotes, cut short, and without what a terminal obeys.
func TestWordsOfAGuest(t *testing.T) {
	text, _ := json.Marshal("\x1b[31m\n'; rm -rf \"" + strings.Repeat("é", 10000))
	a, r := peer(t, func(conn net.Conn, r guest.Request) {
		say(conn, r, `{"id":"ID","failure":{"code":"busy","text":`+string(text)+`,"holders":[{"pid":12,"name":"a\u001bb"},{"pid":-5,"name":"x"}]}}`)
	})
	err := a.UnmountInside(t.Context(), r)
	if !errors.Is(err, attach.ErrInUse) || !strings.Contains(err.Error(), `by process 12 ("a.b"): "`) || strings.ContainsAny(err.Error(), "\x1b\n") || len(err.Error()) > 500 {
		t.Errorf("%q", err)
	}
}

// TestLeftovers: a whole and a half answer of an earlier connection come first, and
// an agent that works longer than the patience is waited for.
func TestLeftovers(t *testing.T) {
	a, r := peer(t, func(conn net.Conn, r guest.Request) {
		_, _ = io.WriteString(conn, "lf\":1}\n{\"id\":\"old\",\"failure\":{\"code\":\"failed\"}}\n")
		for range 5 {
			say(conn, r, `{"id":"ID","working":true}`)
			time.Sleep(500 * time.Millisecond)
		}
		say(conn, r, `{"id":"ID","usage":{"total":1000,"used":400,"free":600},"frozen":true}`)
	})
	a.Patience = 2 * time.Second
	u, frozen, err := a.StatInside(t.Context(), r)
	if err != nil || u.Used != 400 || !frozen {
		t.Errorf("%+v, %v, %v", u, frozen, err)
	}
}

// TestNobodyElse: a socket of another process is not asked, and a machine that has
// ended is told as that.
func TestNobodyElse(t *testing.T) {
	a, r := peer(t, func(conn net.Conn, r guest.Request) { say(conn, r, `{"id":"ID"}`) })
	if err := a.SyncInside(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	start, err := sys.StartTime(os.Getppid())
	if err != nil {
		t.Fatal(err)
	}
	other := r
	other.Target.Pid, other.Target.StartTime = os.Getppid(), start
	if err := a.SyncInside(t.Context(), other); !errors.Is(err, attach.ErrGuestSilent) {
		t.Errorf("another process: %v", err)
	}
	r.Target.StartTime++
	if err := a.SyncInside(t.Context(), r); !errors.Is(err, blockdev.ErrGone) {
		t.Errorf("another life of the pid: %v", err)
	}
}
