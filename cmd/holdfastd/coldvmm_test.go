package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"strings"
	"testing"

	"holdfast/api/client"
	"holdfast/blockdev/attach/vmmtest"
)

// TestDriveOfMicroVMAtStart: what is printed for Firecracker is a drive by its published
// document, to which the server of its protocol holds it. Whoever starts the microVM
// gives it the drive; the daemon finds the process, and its end releases the volume.
func TestDriveOfMicroVMAtStart(t *testing.T) {
	socket := vmmtest.Socket(t)
	vm := vmmtest.Start(t, vmmtest.Firecracker, socket)
	n := newNode(t, "--firecracker-io-engine", "Async")
	ctx := t.Context()
	n.create("data", client.VolumeSpec{Size: 16})
	a, err := n.Attach(ctx, "data", client.Attachment{Holder: "sandbox:vm", Target: client.Target{Type: "vm", VMM: "firecracker"}})
	must(t, err)
	var drive struct {
		ID string `json:"drive_id"`
	}
	must(t, json.Unmarshal(a.Launch.Document, &drive))

	direct := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	r, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://localhost/drives/"+drive.ID, bytes.NewReader(a.Launch.Document))
	must(t, err)
	r.Header.Set("Content-Type", "application/json")
	answer, err := direct.Do(r)
	must(t, err)
	answer.Body.Close()
	if answer.StatusCode != http.StatusNoContent {
		t.Fatalf("PUT /drives/%s %s: %s", drive.ID, a.Launch.Document, answer.Status)
	}
	if d := only(t, vm); d.Size != 16<<20 || !strings.Contains(string(d.Config), `"io_engine":"Async"`) || !strings.Contains(string(d.Config), `"cache_type":"Writeback"`) {
		t.Errorf("the drive: %+v", d)
	}
	vm.Steer("boot")
	_, err = n.Detach(ctx, "data", a.ID)
	if client.Status(err) != http.StatusConflict || !strings.Contains(err.Error(), "has it open") {
		t.Errorf("detached while it runs: %v", err)
	}
	vm.Kill()
	n.untilDetached(t, "data")
}
