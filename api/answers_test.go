package api_test

import (
	"cmp"
	"flag"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/api"
)

var answersUpdate = flag.Bool("answers", false, "print what the tables of docs/answers.md would be")

// answersPath is the document whose tables are the tests: each column a state,
// each row a request, each cell the answer.
const answersPath = "../docs/answers.md"

// answers is one table.
type answers struct {
	states   []string
	requests []string
	cells    map[[2]string]string // state, request -> answer
}

// readAnswers reads the table under a heading. Its columns are `state`, its rows
// begin with `request`.
func readAnswers(t *testing.T, heading string) answers {
	t.Helper()
	text, err := os.ReadFile(answersPath)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("%s has no heading %q", answersPath, heading)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	a := answers{cells: map[[2]string]string{}}
	for _, line := range strings.Split(rest, "\n") {
		cells := cellsOf(line)
		switch {
		case len(cells) < 2 || strings.HasPrefix(cells[0], "---"):
		case a.states == nil:
			a.states = cells[1:]
		case len(cells) != len(a.states)+1:
			t.Fatalf("%s: the row %q has %d cells for %d states", heading, cells[0], len(cells)-1, len(a.states))
		default:
			a.requests = append(a.requests, cells[0])
			for n, name := range a.states {
				a.cells[[2]string{name, cells[0]}] = cells[n+1]
			}
		}
	}
	return a
}

func cellsOf(line string) []string {
	if !strings.HasPrefix(line, "|") {
		return nil
	}
	cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
	for n := range cells {
		cells[n] = strings.Trim(strings.TrimSpace(cells[n]), "`")
	}
	return cells
}

// state brings a world into a state. release lets what waits go on; nil: nothing
// waits.
type state struct {
	limit time.Duration // of an attachment's steps; 0: long
	enter func(w *world) (release func())
}

// request is a method and a path, and a body.
type request struct {
	line string
	body any
	as   string // the key; empty: the writer's
	tar  bool   // the body is an archive, for an upload URL
}

// answered is how a reply is written in a table.
func answered(r reply) string {
	if r.Code == http.StatusOK {
		return "200"
	}
	return fmt.Sprintf("%d %s", r.Code, into[api.ErrorBody](r).Error)
}

// attachmentID names the attachment of the volume v, or one that is not.
func (w *world) attachmentID() string {
	if v, err := w.engine.Volume("main", "v"); err == nil && len(v.Attachments) > 0 {
		return v.Attachments[0].ID
	}
	return "att-00000000000000000000000000"
}

// quickly is how long a request that is to wait is watched for an answer that comes
// too soon; patiently, how long one that is not may take on a busy machine.
const (
	quickly   = 20 * time.Millisecond
	patiently = 2 * time.Minute
)

// ask sends a request in a state and writes down the answer; "waits, then …" when
// it came only after the state's work was let go on.
func ask(t *testing.T, makeWorld func(*testing.T, time.Duration) *world, s state, r request, watch time.Duration) string {
	t.Helper()
	limit := s.limit
	if limit == 0 {
		limit = time.Minute
	}
	w := makeWorld(t, limit)
	release := s.enter(w)
	line := strings.NewReplacer("{id}", w.attachmentID(), "{upload}", w.uploadURL).Replace(r.line)
	key := "Authorization: Bearer " + cmp.Or(r.as, writerKey)
	kind := "Content-Type: application/json"
	if r.tar {
		key, kind = "Authorization: ", "Content-Type: application/x-tar"
	}
	ask := func() string { return answered(send(t, w.handler, line, r.body, key, kind)) }
	if release == nil {
		return ask()
	}
	defer release()
	reply := make(chan string, 1)
	go func() { reply <- ask() }()
	select {
	case text := <-reply:
		return text
	case <-time.After(watch):
	}
	release()
	return "waits, then " + <-reply
}

// holdAnswers tests every cell of a table, and that the table has every state and
// every request.
func holdAnswers(t *testing.T, heading string, makeWorld func(*testing.T, time.Duration) *world, states map[string]state, requests map[string]request) {
	table := readAnswers(t, heading)
	for name := range states {
		if !slices.Contains(table.states, name) {
			t.Errorf("%s: there is no column for the state %q", heading, name)
		}
	}
	for name := range requests {
		if !slices.Contains(table.requests, name) {
			t.Errorf("%s: there is no row for the request %q", heading, name)
		}
	}
	got := map[[2]string]string{}
	for _, name := range table.states {
		s, known := states[name]
		if !known {
			t.Errorf("%s: nobody knows how to bring about %q", heading, name)
			continue
		}
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			for _, what := range table.requests {
				r, known := requests[what]
				if !known {
					t.Fatalf("nobody knows how to ask %q", what)
				}
				at, watch := [2]string{name, what}, patiently
				if *answersUpdate || strings.HasPrefix(table.cells[at], "waits") {
					watch = quickly
				}
				if got[at] = ask(t, makeWorld, s, r, watch); got[at] != table.cells[at] {
					t.Errorf("%s: %s, the table says %s", what, got[at], table.cells[at])
				}
			}
		})
	}
	if *answersUpdate {
		for _, what := range table.requests {
			fmt.Print("| `", what, "` |")
			for _, name := range table.states {
				fmt.Print(" ", got[[2]string{name, what}], " |")
			}
			fmt.Println()
		}
	}
}
