package browsertest

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
)

// patience bounds every wait for something that takes moments on a quiet machine.
const patience = time.Minute

// Browser is one page in a chromium that speaks the DevTools protocol over a
// pipe: https://chromedevtools.github.io/devtools-protocol/, each message ended
// by a zero byte, descriptor 3 to the browser and 4 from it.
type Browser struct {
	t       testing.TB
	to      *os.File
	session string

	mu       sync.Mutex
	next     int
	waiting  map[int]chan message
	troubles []string // what the page's console and the browser complained of
	ended    error
}

type message struct {
	ID      int             `json:"id,omitempty"`
	Session string          `json:"sessionId,omitempty"`
	Method  string          `json:"method,omitempty"`
	Params  json.RawMessage `json:"params,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   *struct {
		Message string `json:"message"`
	} `json:"error,omitempty"`
}

// Open starts a browser with one empty page of a size in pixels; the test's end
// ends it.
func Open(t testing.TB, width, height int) *Browser {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Chromium)
	b := &Browser{t: t, waiting: map[int]chan message{}}
	b.start()
	var target struct{ TargetID string }
	b.do("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.do("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log"} {
		b.do(domain+".enable", nil, nil)
	}
	b.do("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false}, nil)
	return b
}

func (b *Browser) start() {
	b.t.Helper()
	fromTest, to, err1 := os.Pipe()
	from, toTest, err2 := os.Pipe()
	if err := errors.Join(err1, err2); err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	// Its own sandbox wants another user than root; the page is our own.
	cmd := exec.CommandContext(ctx, "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--mute-audio", "--lang=en-US",
		"--force-color-profile=srgb", "--remote-debugging-pipe", "--user-data-dir="+b.t.TempDir(), "about:blank")
	cmd.ExtraFiles = []*os.File{fromTest, toTest}
	cmd.Env = append(os.Environ(), "HOME="+b.t.TempDir(), "TZ=UTC")
	err := cmd.Start()
	fromTest.Close()
	toTest.Close()
	if err != nil {
		cancel()
		b.t.Fatal(err)
	}
	b.to = to
	read := make(chan struct{})
	go func() { defer close(read); b.read(from) }()
	b.t.Cleanup(func() {
		_, _ = b.call("Browser.close", nil)
		done := make(chan struct{})
		go func() { _ = cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(patience):
			cancel()
			<-done
		}
		cancel()
		to.Close()
		from.Close()
		<-read
	})
}

func (b *Browser) read(from *os.File) {
	r := bufio.NewReaderSize(from, 1<<20)
	for {
		text, err := r.ReadBytes(0)
		if err != nil {
			b.mu.Lock()
			b.ended = fmt.Errorf("the browser has ended: %w", err)
			for id, answer := range b.waiting {
				close(answer)
				delete(b.waiting, id)
			}
			b.mu.Unlock()
			return
		}
		var m message
		if json.Unmarshal(text[:len(text)-1], &m) == nil {
			b.take(m)
		}
	}
}

// take hands an answer to who waits for it and keeps complaints.
func (b *Browser) take(m message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch m.Method {
	case "":
		if answer := b.waiting[m.ID]; answer != nil {
			delete(b.waiting, m.ID)
			answer <- m
		}
	case "Runtime.exceptionThrown":
		b.troubles = append(b.troubles, "exception: "+string(m.Params))
	case "Log.entryAdded", "Runtime.consoleAPICalled":
		var p struct {
			Type  string
			Entry struct{ Level, Text, URL string }
		}
		_ = json.Unmarshal(m.Params, &p)
		if p.Type == "error" || p.Type == "warning" || p.Entry.Level == "error" || p.Entry.Level == "warning" {
			b.troubles = append(b.troubles, "console: "+string(m.Params))
		}
	}
}

// Troubles gives what the console and the browser complained of since the last
// time: exceptions, refused scripts and styles, failed requests.
func (b *Browser) Troubles() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	found := b.troubles
	b.troubles = nil
	return found
}

func (b *Browser) call(method string, params any) (json.RawMessage, error) {
	raw, err := json.Marshal(params)
	if err != nil {
		return nil, err
	}
	answer := make(chan message, 1)
	b.mu.Lock()
	if b.ended != nil {
		defer b.mu.Unlock()
		return nil, b.ended
	}
	b.next++
	m := message{ID: b.next, Session: b.session, Method: method, Params: raw}
	if params == nil {
		m.Params = nil
	}
	b.waiting[m.ID] = answer
	text, _ := json.Marshal(m)
	_, err = b.to.Write(append(text, 0))
	b.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case m, ok := <-answer:
		switch {
		case !ok:
			return nil, b.ended
		case m.Error != nil:
			return nil, fmt.Errorf("%s: %s", method, m.Error.Message)
		}
		return m.Result, nil
	case <-time.After(patience):
		return nil, fmt.Errorf("%s: no answer", method)
	}
}

func (b *Browser) do(method string, params, result any) {
	b.t.Helper()
	raw, err := b.call(method, params)
	if err == nil && result != nil {
		err = json.Unmarshal(raw, result)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// Do gives the browser a command of the protocol and ignores what it answers.
func (b *Browser) Do(method string, params any) {
	b.t.Helper()
	b.do(method, params, nil)
}

// Go opens an address.
func (b *Browser) Go(url string) {
	b.t.Helper()
	var r struct{ ErrorText string }
	b.do("Page.navigate", map[string]any{"url": url}, &r)
	if r.ErrorText != "" {
		b.t.Fatalf("%s: %s", url, r.ErrorText)
	}
}

// Eval gives the value of an expression in the page; promises are waited for.
func Eval[T any](b *Browser, expression string) T {
	b.t.Helper()
	var r struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails *struct {
			Text      string
			Exception struct{ Description string }
		}
	}
	b.do("Runtime.evaluate", map[string]any{"expression": expression, "awaitPromise": true, "returnByValue": true}, &r)
	if r.ExceptionDetails != nil {
		b.t.Fatalf("%s: %s %s", expression, r.ExceptionDetails.Text, r.ExceptionDetails.Exception.Description)
	}
	var v T
	if len(r.Result.Value) > 0 {
		if err := json.Unmarshal(r.Result.Value, &v); err != nil {
			b.t.Fatalf("%s: %v", expression, err)
		}
	}
	return v
}

// Await waits until an expression is true.
func (b *Browser) Await(expression string) {
	b.t.Helper()
	deadline := time.Now().Add(patience)
	for !Eval[bool](b, "!!("+expression+")") {
		if time.Now().After(deadline) {
			b.t.Fatalf("it does not become true: %s\nthe page says: %s\ncomplaints: %v", expression, Eval[string](b, "document.body.innerText.slice(0, 3000)"), b.Troubles())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Click clicks into the middle of an element, as a mouse does.
func (b *Browser) Click(selector string) {
	b.t.Helper()
	b.Await("document.querySelector(" + quote(selector) + ")")
	at := Eval[[]float64](b, "(() => { const e = document.querySelector("+quote(selector)+"); e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()")
	for _, kind := range []string{"mousePressed", "mouseReleased"} {
		b.do("Input.dispatchMouseEvent", map[string]any{"type": kind, "x": at[0], "y": at[1], "button": "left", "clickCount": 1}, nil)
	}
}

// ClickUntil clicks until an expression is true: what is clicked may be drawn
// anew under the mouse.
func (b *Browser) ClickUntil(selector, expression string) {
	b.t.Helper()
	for range 20 {
		b.Click(selector)
		for range 50 {
			if Eval[bool](b, "!!("+expression+")") {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	b.Await(expression)
}

// Type puts a text where the cursor is, as a keyboard does; Enter sends a form.
func (b *Browser) Type(text string) {
	b.t.Helper()
	b.do("Input.insertText", map[string]any{"text": text}, nil)
}

// Press presses a key: "Enter", "ArrowDown".
func (b *Browser) Press(key string) {
	b.t.Helper()
	codes := map[string]int{"Enter": 13, "ArrowDown": 40, "ArrowUp": 38}
	params := map[string]any{"type": "keyDown", "key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
	if key == "Enter" {
		params["text"] = "\r"
	}
	b.do("Input.dispatchKeyEvent", params, nil)
	params["type"] = "keyUp"
	delete(params, "text")
	b.do("Input.dispatchKeyEvent", params, nil)
}

// Screenshot is the page as a PNG.
func (b *Browser) Screenshot() []byte {
	b.t.Helper()
	var r struct{ Data string }
	b.do("Page.captureScreenshot", map[string]any{"format": "png"}, &r)
	png, err := base64.StdEncoding.DecodeString(r.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	return png
}

func quote(s string) string {
	q, _ := json.Marshal(s)
	return string(q)
}
