package main_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"holdfast/templates/archivetest"
)

// bounds are those of the daemon of this test: large enough for a million
// entries, which are one too many.
var bounds = archivetest.Bounds{Bytes: 640 << 20, Entries: 999_999, Free: 1 << 30, Ratio: 200}

// mostMemory is what the daemon's memory may grow by while it refuses everything
// that there is, in bytes. Most of it is for the names of a million entries.
const mostMemory = 768 << 20

// uploader sends to a daemon over HTTP as strangers do.
type uploader struct {
	*node
	t        testing.TB
	address  string
	key      string
	template string
}

func newUploader(t *testing.T, args ...string) *uploader {
	n := newNode(t, append([]string{"--max-archive", "640MiB", "--max-entries", "999999"}, args...)...)
	address, err := os.ReadFile(filepath.Join(n.state, "listen"))
	must(t, err)
	key, err := os.ReadFile(filepath.Join(n.state, "dev.key"))
	must(t, err)
	return &uploader{node: n, t: t, address: strings.TrimSpace(string(address)), key: strings.TrimSpace(string(key)), template: "hostile"}
}

// begin gets an upload URL.
func (u *uploader) begin() string {
	u.t.Helper()
	req, err := http.NewRequestWithContext(u.t.Context(), http.MethodPut, "http://"+u.address+"/v0/volume_templates/"+u.template+"?upload=true", strings.NewReader(`{}`))
	must(u.t, err)
	req.Header.Set("Authorization", "Bearer "+u.key)
	resp, err := http.DefaultClient.Do(req)
	must(u.t, err)
	defer resp.Body.Close()
	to := resp.Header.Get("X-Blaxel-Upload-Url")
	if resp.StatusCode != 200 || to == "" {
		u.t.Fatalf("no upload URL: %s", resp.Status)
	}
	return to
}

// put sends a body as clients do.
func (u *uploader) put(to string, length int64, body io.Reader) (status int, word, message string) {
	u.t.Helper()
	ctx, cancel := context.WithTimeout(u.t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, to, body)
	must(u.t, err)
	req.ContentLength = length
	req.Header.Set("Content-Type", "application/x-tar")
	resp, err := http.DefaultClient.Do(req)
	must(u.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	must(u.t, err)
	var answer struct{ Error, Message string }
	must(u.t, json.Unmarshal(b, &answer))
	return resp.StatusCode, answer.Error, answer.Message
}

// Every hostile archive, sent to a real daemon: 4xx that names the entry, and
// nothing is left of it, in staging, in the pool or in memory.
func TestHostileUploads(t *testing.T) {
	u := newUploader(t)
	u.put(u.begin(), 1024, bytes.NewReader(make([]byte, 1024))) // an empty tree: what is made once is made
	before, memory := u.images(), u.memory("VmHWM")
	cases := append(archivetest.Hostile(bounds), archivetest.Million())
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			at := *u
			at.t = t
			to := at.begin()
			if c.Format != "" {
				to += "&format=" + url.QueryEscape(c.Format)
			}
			body, length := c.Open()
			status, word, message := at.put(to, length, body)
			if status != 400 || word != "ARCHIVE_REFUSED" {
				t.Fatalf("%d %s: %s", status, word, message)
			}
			if !strings.Contains(message, c.Says) || !strings.Contains(message, c.Entry) {
				t.Errorf("%q does not say %q and %q", message, c.Says, c.Entry)
			}
			if strings.Contains(message, at.state) {
				t.Errorf("a path of the host is in %q", message)
			}
		})
	}
	u.nothingLeft(before)
	if grown := u.memory("VmHWM") - memory; grown > mostMemory {
		t.Errorf("the daemon needed %d MiB more", grown>>20)
	} else {
		t.Logf("%d archives; the daemon needed at most %d MiB more than its %d", len(cases), grown>>20, memory>>20)
	}
}

// images lists what is in the pool.
func (u *uploader) images() string {
	u.t.Helper()
	var names []string
	for _, dir := range []string{"images", "drafts"} {
		entries, err := os.ReadDir(filepath.Join(u.poolDir(), dir))
		must(u.t, err)
		for _, e := range entries {
			names = append(names, dir+"/"+e.Name())
		}
	}
	return strings.Join(names, "\n")
}

// poolDir is where the daemon has its pool: below a mount of its own.
func (u *uploader) poolDir() string {
	u.t.Helper()
	var found string
	err := filepath.WalkDir(u.state, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "pool.json" {
			found = filepath.Dir(path)
			return fs.SkipAll
		}
		return nil
	})
	if err != nil || found == "" {
		u.t.Fatalf("no pool: %v", err)
	}
	return found
}

func (u *uploader) nothingLeft(images string) {
	u.t.Helper()
	if have := u.images(); have != images {
		u.t.Errorf("images before:\n%s\nand after:\n%s", images, have)
	}
	err := filepath.WalkDir(filepath.Join(u.poolDir(), "staging"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			u.t.Errorf("left in staging: %s", path)
		}
		return err
	})
	must(u.t, err)
	pools, err := u.Pools(u.t.Context())
	must(u.t, err)
	if len(pools) != 1 {
		u.t.Errorf("%+v", pools)
	}
}

// memory reads a line of the daemon's status, in bytes.
func (u *uploader) memory(line string) int64 {
	u.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", u.cmd.Process.Pid))
	must(u.t, err)
	_, rest, _ := strings.Cut(string(b), line+":")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	must(u.t, err)
	return kib << 10
}

// Requests that are wrong around a good archive.
func TestHostileRequests(t *testing.T) {
	u := newUploader(t, "--transfer-timeout", "500ms")
	good := archivetest.Tar(archivetest.Holding("a", strings.Repeat("x", 3_000_000)))
	before := u.images()
	refused := func(what, to string, word string) {
		t.Helper()
		if status, have, message := u.put(to, int64(len(good)), bytes.NewReader(good)); status != 400 || have != word {
			t.Errorf("%s: %d %s: %s", what, status, have, message)
		}
	}
	base := u.begin()
	at, err := url.Parse(base)
	must(t, err)
	with := func(change func(url.Values)) string {
		c, q := *at, at.Query()
		change(q)
		c.RawQuery = q.Encode()
		return c.String()
	}
	const gone = "UPLOAD_URL_INVALID"
	refused("a forged signature", with(func(q url.Values) { q.Set("signature", strings.Repeat("A", 43)) }), gone)
	refused("no signature", with(func(q url.Values) { q.Del("signature") }), gone)
	refused("a later expiry", with(func(q url.Values) { q.Set("expires", "99999999999") }), gone)
	refused("no query", strings.Split(base, "?")[0], gone)
	refused("another id", strings.Replace(base, "/uploads/rev-", "/uploads/rev-0", 1), gone)
	refused("a foreign expiry before ours", strings.Replace(base, "?", "?expires=99999999999&", 1), gone)
	refused("an unknown format", base+"&format=rar", "INVALID_REQUEST")
	refused("a format with a path", base+"&format=../../tar", "INVALID_REQUEST")
	refused("expired, and signed by us", u.signed(t, at.Path, time.Now().Add(-time.Second)), gone)

	if status, _, _ := u.put(strings.Replace(base, "/uploads/rev-", "/uploads/..%2F..%2Fetc%2F", 1), int64(len(good)), bytes.NewReader(good)); status != 404 {
		t.Errorf("a path for an id: %d", status)
	}

	// Without a length, or with one that is not the body's.
	if status, word, _ := u.put(base, -1, io.MultiReader(bytes.NewReader(good))); status != 400 || word != "INVALID_REQUEST" {
		t.Errorf("chunked: %d %s", status, word)
	}
	for name, n := range map[string]int{"nothing": 0, "a header": 512, "half": len(good) / 2, "all but one byte": len(good) - 1} {
		u.drop(t, at, len(good), good[:n])
		u.nothingLeft(before)
		t.Logf("dropped after %s", name)
	}
	if answer := u.stall(t, at, len(good), good[:1000]); !strings.Contains(answer, " 400 ") && !strings.Contains(answer, " 5") {
		t.Errorf("a body that stands still: %q", answer)
	}
	u.nothingLeft(before)

	// Two uploads to one URL: one of them is taken.
	r, w := io.Pipe()
	first := make(chan int, 1)
	go func() {
		status, _, _ := u.put(base, int64(len(good)), r)
		first <- status
	}()
	_, err = w.Write(good[:1<<20])
	must(t, err)
	u.receiving(t)
	refused("while another is under way", base, gone)
	_, err = w.Write(good[1<<20:])
	must(t, err)
	must(t, w.Close())
	if status := <-first; status != 200 {
		t.Errorf("the first of two uploads: %d", status)
	}
	refused("used", base, gone)
}

// receiving waits until an upload has its place in staging.
func (u *uploader) receiving(t *testing.T) {
	t.Helper()
	staging := filepath.Join(u.poolDir(), "staging", "uploads")
	for deadline := time.Now().Add(patience); ; {
		if entries, err := os.ReadDir(staging); err == nil && len(entries) > 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing comes to staging")
		}
	}
}

// signed makes the URL that the daemon would have given out for another time.
func (u *uploader) signed(t *testing.T, path string, expires time.Time) string {
	t.Helper()
	secret, err := os.ReadFile(filepath.Join(u.state, "signing.key"))
	must(t, err)
	when := strconv.FormatInt(expires.Unix(), 10)
	mac := hmac.New(sha256.New, secret)
	fmt.Fprintf(mac, "holdfast upload 1\n%s\n%s\n", strings.TrimPrefix(path, "/uploads/"), when)
	q := url.Values{"expires": {when}, "signature": {base64.RawURLEncoding.EncodeToString(mac.Sum(nil))}}
	return "http://" + u.address + path + "?" + q.Encode()
}

func (u *uploader) dial(t *testing.T, at *url.URL, length int, body []byte) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", u.address)
	must(t, err)
	_, err = fmt.Fprintf(c, "PUT %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", at.RequestURI(), length, body)
	must(t, err)
	return c.(*net.TCPConn)
}

// drop sends a part of a body and cuts the connection; it returns when the
// daemon has noticed. Its answer, which hardly a client reads, is about the body
// or about the client that left, whichever it notices first.
func (u *uploader) drop(t *testing.T, at *url.URL, length int, body []byte) {
	t.Helper()
	c := u.dial(t, at, length, body)
	must(t, c.CloseWrite())
	_ = c.SetReadDeadline(time.Now().Add(patience))
	answer, err := io.ReadAll(c)
	if err != nil || len(answer) > 0 && !strings.Contains(string(answer), " 400 ") && !strings.Contains(string(answer), "context canceled") {
		t.Errorf("%q, %v", answer, err)
	}
	must(t, c.Close())
	u.idle(t)
}

// stall sends a part of a body and waits for the daemon to lose patience.
func (u *uploader) stall(t *testing.T, at *url.URL, length int, body []byte) string {
	t.Helper()
	c := u.dial(t, at, length, body)
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(patience))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		t.Errorf("%v", err)
	}
	u.idle(t)
	return line
}

// idle waits until no upload is under way.
func (u *uploader) idle(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		resp, err := http.Get("http://" + u.address + "/metrics")
		must(t, err)
		b, err := io.ReadAll(resp.Body)
		must(t, errors.Join(err, resp.Body.Close()))
		if strings.Contains(string(b), "holdfast_http_uploads_in_progress 0") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("an upload does not end: %s", b)
		}
	}
}
