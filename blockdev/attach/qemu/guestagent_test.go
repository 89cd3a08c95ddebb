package qemu

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
)

// talk gives a connection to an agent that answers as say does.
func talk(t *testing.T, say func(command string, arguments json.RawMessage) string) *guestAgent {
	t.Helper()
	here, there := net.Pipe()
	deadline := time.Now().Add(time.Minute)
	if err := errors.Join(here.SetDeadline(deadline), there.SetDeadline(deadline)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { here.Close(); there.Close() })
	go func() {
		r := bufio.NewReader(there)
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			var request struct {
				Execute   string
				Arguments json.RawMessage
			}
			if json.Unmarshal([]byte(strings.TrimPrefix(line, "\xff")), &request) != nil {
				continue
			}
			if _, err := io.WriteString(there, say(request.Execute, request.Arguments)); err != nil {
				return
			}
		}
	}()
	return &guestAgent{here, bufio.NewReaderSize(here, 4096)}
}

const disks = `{"return":[{"name":"vda1","mountpoint":"/","type":"ext4","disk":[{"serial":"root"}]},` +
	`{"name":"vdb","mountpoint":"/data","type":"xfs","disk":[{"serial":"ours","bus-type":"virtio"}]},{"name":"dm-0","mountpoint":"/x","disk":[]}]}` + "\n"

// TestGuestAgent: what is left of an earlier conversation is passed over, and only
// the filesystems of the disk are frozen, and thawed.
func TestGuestAgent(t *testing.T) {
	var asked []string
	g := talk(t, func(command string, arguments json.RawMessage) string {
		asked = append(asked, command+string(arguments))
		switch command {
		case "guest-sync-delimited":
			var a struct{ ID int64 }
			_ = json.Unmarshal(arguments, &a)
			return `{"return": "left over"}` + "\n\xff" + `{"return": 1}` + "\n\xff" + fmt.Sprintf(`{"return": %d}`, a.ID) + "\n"
		case "guest-get-fsinfo":
			return disks
		case "guest-fsfreeze-thaw":
			return `{"error": {"class": "GenericError", "desc": "not frozen"}}` + "\n"
		}
		return `{"return": 1}` + "\n"
	})
	if err := g.begin(); err != nil {
		t.Fatal(err)
	}
	places, err := g.mountsOf("ours")
	if err != nil || !slices.Equal(places, []string{"/data"}) {
		t.Fatalf("mounted at %v, %v", places, err)
	}
	if _, err := g.ask("guest-fsfreeze-freeze-list", map[string]any{"mountpoints": places}); err != nil {
		t.Error(err)
	}
	if _, err := g.ask("guest-fsfreeze-thaw", nil); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "not frozen") {
		t.Errorf("a refusal of the guest: %v", err)
	}
	if asked[len(asked)-2] != `guest-fsfreeze-freeze-list{"mountpoints":["/data"]}` {
		t.Errorf("asked %v", asked)
	}
}

// TestHostileGuestAgent: nonsense, endless lines and silence end the conversation.
func TestHostileGuestAgent(t *testing.T) {
	for name, answer := range map[string]string{
		"not JSON":         "\xffhello\n",
		"another number":   "\xff{\"return\": 7}\n",
		"an endless line":  "\xff" + strings.Repeat("x", agentLine+1),
		"never a new line": strings.Repeat("x", agentLine+1),
	} {
		g := talk(t, func(string, json.RawMessage) string { return strings.Repeat(answer, mostAnswers+1) })
		if err := g.begin(); err == nil {
			t.Errorf("%s is taken for an agent", name)
		}
	}
	g := talk(t, func(string, json.RawMessage) string { return `{"return": {"mountpoint": 5}}` + "\n" })
	if _, err := g.mountsOf("ours"); !errors.Is(err, errAgent) {
		t.Errorf("a list that is none: %v", err)
	}
}
