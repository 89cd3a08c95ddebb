package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/preflight"
)

// TestReadableKeys: a private key that others than its owner can read is warned of, by
// its setting, whichever it is.
func TestReadableKeys(t *testing.T) {
	if c := keysCheck(Config{}); c.Status != preflight.OK || c.Found != "none are set" {
		t.Errorf("without keys: %+v", c)
	}
	dir := t.TempDir()
	key := func(name string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("PEM"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := key("good", 0o400)
	if c := keysCheck(Config{TLSKey: good, ExportKey: key("owners", 0o600)}); c.Status != preflight.OK || !strings.Contains(c.Found, "owners") {
		t.Errorf("keys of their owners alone: %+v", c)
	}
	if c := keysCheck(Config{ExportKey: filepath.Join(dir, "none")}); c.Status != preflight.OK {
		t.Errorf("a key that is not there: %+v", c)
	}
	for name, mode := range map[string]os.FileMode{"group": 0o640, "others": 0o604, "writable": 0o620} {
		path := key(name, mode)
		for setting, c := range map[string]Config{"tls_key": {TLSKey: path, ExportKey: good}, "export_key": {TLSKey: good, ExportKey: path}} {
			got := keysCheck(c)
			if got.Status != preflight.Warn || !strings.Contains(got.Found, setting+": "+path) || got.Consequence == "" || !strings.Contains(got.Fix, "chmod 600 "+path) {
				t.Errorf("%s of mode %o: %+v", setting, mode, got)
			}
		}
	}
}

// TestStateDirectoryOfOthers: a state directory that others may write in is warned of;
// one that they may only enter is not, and neither is none.
func TestStateDirectoryOfOthers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if c := stateCheck(Config{StateDir: dir}); c.Status != preflight.OK || c.Fix != "" {
		t.Errorf("before the first start: %+v", c)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[os.FileMode]preflight.Status{
		0o700: preflight.OK, 0o711: preflight.OK, 0o755: preflight.OK, 0o770: preflight.Warn, 0o702: preflight.Warn, 0o777 | os.ModeSticky: preflight.Warn,
	} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		c := stateCheck(Config{StateDir: dir})
		if c.Status != want || (want == preflight.Warn) != strings.Contains(c.Fix, "chmod 700 "+dir) || (want == preflight.Warn) != (c.Consequence != "") {
			t.Errorf("mode %o: %+v", mode, c)
		}
	}
	if os.Geteuid() != 0 {
		return // only root gives directories away
	}
	if err := errors.Join(os.Chmod(dir, 0o700), os.Chown(dir, 65534, 0)); err != nil {
		t.Fatal(err)
	}
	if c := stateCheck(Config{StateDir: dir}); c.Status != preflight.Warn || !strings.Contains(c.Found, "65534") {
		t.Errorf("somebody else's: %+v", c)
	}
}

// TestHostIsNamedOnce: the name is kept, and one that was not made here is refused
// rather than used as part of a path.
func TestHostIsNamedOnce(t *testing.T) {
	n := &node{at: layout{t.TempDir()}}
	first, err := n.hostID()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := n.hostID(); err != nil || again != first {
		t.Errorf("%q and then %q, %v", first, again, err)
	}
	for _, text := range []string{"", "\n", first[:10] + "\n", "../../../../etc/holdfast\n", first + "\n" + first + "\n", strings.ToUpper(first)} {
		if err := os.WriteFile(n.at.host(), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if id, err := n.hostID(); err == nil || !strings.Contains(err.Error(), n.at.host()) || !strings.Contains(err.Error(), "remove it") {
			t.Errorf("%q is taken as %q, %v", text, id, err)
		}
	}
}
