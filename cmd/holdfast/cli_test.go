package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/internal/tarball"
)

func TestWhichServerIsAsked(t *testing.T) {
	for name, c := range map[string]struct {
		flags serverFlags
		env   map[string]string
		want  client.Options
	}{
		"nothing said":          {want: client.Options{Socket: "/var/lib/holdfast/holdfastd.sock", Workspace: "main"}},
		"state directory":       {flags: serverFlags{stateDir: "/d"}, want: client.Options{Socket: "/d/holdfastd.sock", Workspace: "main"}},
		"our environment":       {env: map[string]string{"HOLDFAST_URL": "http://h:1/v0", "HOLDFAST_KEY": "k", "HOLDFAST_WORKSPACE": "w"}, want: client.Options{URL: "http://h:1/v0", Key: "k", Workspace: "w"}},
		"Blaxel's environment":  {env: map[string]string{"BL_API_URL": "http://h:1/v0", "BL_API_KEY": "k", "BL_WORKSPACE": "w"}, want: client.Options{URL: "http://h:1/v0", Key: "k", Workspace: "w"}},
		"ours before Blaxel's":  {env: map[string]string{"BL_API_URL": "http://b", "HOLDFAST_URL": "http://h/v0"}, want: client.Options{URL: "http://h/v0"}},
		"flag before all":       {flags: serverFlags{socket: "/s"}, env: map[string]string{"HOLDFAST_URL": "http://h/v0", "HOLDFAST_KEY": "k"}, want: client.Options{Socket: "/s", Workspace: "main"}},
		"base path is added":    {flags: serverFlags{url: "http://h:1/"}, want: client.Options{URL: "http://h:1/v0"}},
		"other path is kept":    {flags: serverFlags{url: "https://h/api"}, want: client.Options{URL: "https://h/api"}},
		"socket in environment": {env: map[string]string{"HOLDFAST_SOCKET": "/s"}, want: client.Options{Socket: "/s", Workspace: "main"}},
	} {
		t.Run(name, func(t *testing.T) {
			c.flags.getenv = func(k string) string { return c.env[k] }
			got := c.flags.options()
			got.UserAgent = ""
			if got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestExitCodes(t *testing.T) {
	refusal := func(status int, code string) error {
		return fmt.Errorf("x: %w", &client.Error{Status: status, Code: code, Message: "m"})
	}
	for want, errs := range map[int][]error{
		exitFailure:      {errors.New("other"), refusal(500, "INTERNAL_ERROR"), fmt.Errorf("f: %w", tarball.ErrChanged)},
		exitUsage:        {usageError{"bad"}},
		exitNotFound:     {refusal(404, "NOT_FOUND")},
		exitConflict:     {refusal(409, "VOLUME_ATTACHED"), refusal(409, "VOLUME_ALREADY_EXISTS")},
		exitUnauthorized: {refusal(401, "UNAUTHORIZED"), refusal(403, "FORBIDDEN")},
		exitInvalid:      {refusal(400, "INVALID_REQUEST"), refusal(413, "BODY_TOO_LARGE")},
		exitFull:         {refusal(403, "POOL_FULL"), refusal(507, "METADATA_FULL"), refusal(403, "QUOTA_EXCEEDED")},
		exitUnreachable:  {refusal(503, "SERVICE_UNAVAILABLE"), refusal(429, "TOO_MANY_REQUESTS")},
	} {
		for _, err := range errs {
			a := &app{parsed: true, server: serverFlags{getenv: func(string) string { return "" }}}
			if got, text, _ := a.explain(err); got != want || text == "" {
				t.Errorf("%v: exit code %d, want %d; text %q", err, got, want, text)
			}
		}
	}
}

func cli(t *testing.T, args ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(t.Context(), args, &o, &e)
	return code, o.String(), e.String()
}

func TestWrongCommandLines(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"volume", "lst"}, "unknown command"},
		{[]string{"volume", "lst"}, "hint: see holdfast volume --help"},
		{[]string{"volume", "get"}, "accepts 1 arg"},
		{[]string{"attachment", "delete", "v"}, "hint: holdfast attachment delete VOLUME ID [flags]; see holdfast attachment delete --help"},
		{[]string{"volume", "list", "--nope"}, "unknown flag"},
		{[]string{"volume", "list", "-o", "xml"}, "table, json, yaml"},
		{[]string{"volume", "create", "a", "--size", "1.5GiB"}, "--size"},
		{[]string{"volume", "create", "a", "--size", "0"}, "at least 1"},
		{[]string{"volume", "create", "a", "--size", "1KiB"}, "MiB"},
		{[]string{"volume", "create", "a", "--label", "nope"}, "KEY=VALUE"},
		{[]string{"volume", "update", "a"}, "nothing to change"},
		{[]string{"attachment", "create", "a", "--holder", "sandbox:x"}, "one target"},
		{[]string{"attachment", "create", "a", "--holder", "sandbox:x", "--path", "/x", "--qemu-socket", "/y"}, "one target"},
		{[]string{"attachment", "create", "a", "--holder", "sandbox:x", "--firecracker-socket", "/x", "--cloud-hypervisor-socket", "/y"}, "one target"},
		{[]string{"attachment", "create", "a", "--path", "/x"}, "holder"},
		{[]string{"key", "create", "--expires", "soon"}, "--expires"},
		{[]string{"--server", "ftp://x", "volume", "list"}, "http"},
		{[]string{"--server", "127.0.0.1:7433", "volume", "list"}, "http://127.0.0.1:7433/v0"},
		{[]string{"--server", "localhost:7433", "volume", "list"}, "http://127.0.0.1:7433/v0"},
	} {
		code, out, errOut := cli(t, c.args...)
		if code != exitUsage || !strings.Contains(errOut, c.want) || out != "" {
			t.Errorf("%v: exit code %d, stdout %q, stderr %q", c.args, code, out, errOut)
		}
	}
}

func TestUnreachableServerHasAHint(t *testing.T) {
	code, _, errOut := cli(t, "--state-dir", t.TempDir(), "volume", "list")
	if code != exitUnreachable || !strings.Contains(errOut, "hint: ") || !strings.Contains(errOut, "holdfastd.sock") {
		t.Errorf("exit code %d, stderr %q", code, errOut)
	}
}

// TestSchemeOfTheServer: who confuses http and https, or meets a certificate that
// nobody here has signed, is told which of them it is.
func TestSchemeOfTheServer(t *testing.T) {
	page := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("[]")) })
	plain, secure := httptest.NewServer(page), httptest.NewUnstartedServer(page)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0) // the handshake that fails on purpose
	secure.StartTLS()
	t.Cleanup(plain.Close)
	t.Cleanup(secure.Close)
	for url, want := range map[string]string{
		strings.Replace(plain.URL, "http://", "https://", 1): "does not speak TLS",
		secure.URL: "certificate",
	} {
		code, _, errOut := cli(t, "--server", url, "--key", "k", "volume", "list")
		if code != exitUnreachable || !strings.Contains(errOut, want) || !strings.Contains(errOut, "hint: ") {
			t.Errorf("%s: exit code %d, stderr %q", url, code, errOut)
		}
	}
}

func TestHelpNamesEveryExitCode(t *testing.T) {
	_, out, _ := cli(t, "--help")
	for code := exitOK; code <= exitUnreachable; code++ {
		if !strings.Contains(out, fmt.Sprintf("\n  %d  ", code)) {
			t.Errorf("help does not explain exit code %d", code)
		}
	}
}

func TestExpiry(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Time{
		"720h": now.Add(720 * time.Hour), "30d": now.AddDate(0, 0, 30), "2027-01-31T00:00:00Z": time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC),
	} {
		if got, err := parseExpiry(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "d", "-1h", "0", "99999999d", "1w"} {
		if got, err := parseExpiry(text, now); err == nil {
			t.Errorf("%q was taken as %v", text, got)
		}
	}
}

func TestTenantsTextCannotSteerTheTerminal(t *testing.T) {
	if got := cell("a\x1b[2Jb\tc\nd"); strings.ContainsAny(got, "\x1b\t\n") {
		t.Errorf("cell is %q", got)
	}
	if got := cell("café 日本語 🚀"); got != "café 日本語 🚀" {
		t.Errorf("cell is %q", got)
	}
}

func TestBar(t *testing.T) {
	half := bar("t", 50<<20, 100<<20, 2*time.Second)
	if !strings.Contains(half, strings.Repeat("#", 15)+strings.Repeat("-", 15)) || !strings.Contains(half, "25 MiB/s") {
		t.Error(half)
	}
	if full := bar("t", 10, 10, 0); !strings.Contains(full, strings.Repeat("#", 30)+"]") || !strings.Contains(full, "building") {
		t.Error(full)
	}
}

func TestMode(t *testing.T) {
	for _, c := range [][3]string{{"directory", "0755", "drwxr-xr-x"}, {"file", "4711", "-rwx--x--x"}, {"odd", "0600", "?rw-------"}} {
		if got := mode(c[0], c[1]); got != c[2] {
			t.Errorf("%v: %s", c, got)
		}
	}
}
