package gosdk

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	blaxel "github.com/blaxel-ai/sdk-go"
)

func box(name string, volumes ...blaxel.VolumeAttachmentParam) blaxel.SandboxNewParams {
	return blaxel.SandboxNewParams{Sandbox: blaxel.SandboxParam{
		Metadata: blaxel.MetadataParam{Name: name, Labels: map[string]string{"language": "go"}},
		Spec: blaxel.SandboxSpecParam{
			Region: blaxel.String(region), Volumes: volumes,
			Runtime: blaxel.SandboxRuntimeParam{Memory: blaxel.Int(256)},
		},
	}}
}

func at(path string, v *blaxel.VolumeInstance, readOnly bool) blaxel.VolumeAttachmentParam {
	return blaxel.VolumeAttachmentParam{Name: blaxel.String(v.Name()), MountPath: blaxel.String(path), ReadOnly: blaxel.Bool(readOnly)}
}

func begin(t *testing.T, c blaxel.Client, p blaxel.SandboxNewParams) *blaxel.SandboxInstance {
	t.Helper()
	s, err := c.Sandboxes.NewInstance(t.Context(), p)
	must(t, err)
	t.Cleanup(func() { end(t, c, s) })
	return s
}

// end deletes a sandbox and waits until asking for it fails.
func end(t *testing.T, c blaxel.Client, s *blaxel.SandboxInstance) {
	t.Helper()
	var e *blaxel.Error
	if err := s.Delete(context.Background()); err != nil && (!errors.As(err, &e) || e.StatusCode != http.StatusNotFound) {
		t.Errorf("delete %s: %v", s.Metadata.Name, err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		_, err := c.Sandboxes.GetInstance(context.Background(), s.Metadata.Name)
		if errors.As(err, &e) && e.StatusCode == http.StatusNotFound {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is not gone: %v", s.Metadata.Name, err)
		}
	}
}

func run(t *testing.T, s *blaxel.SandboxInstance, command string) string {
	t.Helper()
	p, err := s.Process.New(t.Context(), blaxel.ProcessRequestParam{Command: command, WaitForCompletion: blaxel.Bool(true)})
	must(t, err)
	if p.Status != "completed" || p.ExitCode != 0 {
		t.Fatalf("%s: %s, exit code %d: %s", command, p.Status, p.ExitCode, p.Logs)
	}
	return p.Stdout
}

func TestSandboxWithVolume(t *testing.T) {
	c := sdk(t)
	v := create(t, c, asking(unique("go"), 16))
	first := begin(t, c, box(unique("go-box"), at("/data", v, false)))
	if first.Status != "DEPLOYED" || len(first.Spec.Volumes) != 1 || first.Spec.Volumes[0].MountPath != "/data" {
		t.Errorf("%s", first.RawJSON())
	}
	run(t, first, "echo 'from the first' > /data/note")
	binary := bytes.Repeat([]byte{0, 1, 2, 255, '\n'}, 1000)
	_, err := first.FS.WriteBinary(t.Context(), "/data/bytes", binary, "0600")
	must(t, err)
	_, err = first.FS.Write(t.Context(), "/data/dir/text", "written by the SDK")
	must(t, err)
	text, err := first.FS.Read(t.Context(), "/data/dir/text")
	must(t, err)
	got, err := first.FS.ReadBinary(t.Context(), "/data/bytes")
	must(t, err)
	if text != "written by the SDK" || !bytes.Equal(got, binary) {
		t.Errorf("%q, %d bytes", text, len(got))
	}
	end(t, c, first)
	second := begin(t, c, box(unique("go-box"), at("/elsewhere", v, true)))
	if got := run(t, second, "cat /elsewhere/note /elsewhere/dir/text; touch /elsewhere/x 2>/dev/null || echo ' read-only'"); got != "from the first\nwritten by the SDK read-only\n" {
		t.Errorf("%q", got)
	}
}

func TestSandboxDuplicates(t *testing.T) {
	c := sdk(t)
	name := unique("go-box")
	first := begin(t, c, box(name))
	before := sent.Load()
	_, err := c.Sandboxes.New(t.Context(), box(name))
	is(t, err, http.StatusConflict)
	if n := sent.Load() - before; n != 1 {
		t.Errorf("the duplicate was sent %d times", n)
	}
	if !strings.Contains(err.Error(), "SANDBOX_ALREADY_EXISTS") {
		t.Errorf("%v", err)
	}
	again, err := c.Sandboxes.NewInstanceIfNotExists(t.Context(), box(name))
	must(t, err)
	if again.Metadata.CreatedAt != first.Metadata.CreatedAt {
		t.Errorf("%s, want %s", again.Metadata.CreatedAt, first.Metadata.CreatedAt)
	}
	page, err := c.Sandboxes.ListInstances(t.Context(), blaxel.SandboxListParams{Q: blaxel.String(name), Limit: blaxel.Int(5)})
	must(t, err)
	if len(page.Data) != 1 || page.Data[0].Metadata.Name != name || page.HasNextPage() {
		t.Errorf("%s", page.RawJSON())
	}
}

func TestSandboxFailsWithoutRoom(t *testing.T) {
	c := sdk(t)
	v := create(t, c, asking(unique("go"), 16))
	s := begin(t, c, box(unique("go-box"), at("/data", v, false)))
	p, err := s.Process.New(t.Context(), blaxel.ProcessRequestParam{
		Command: "dd if=/dev/zero of=/data/big bs=1M count=20", WaitForCompletion: blaxel.Bool(true),
	})
	must(t, err)
	if p.Status != "failed" || p.ExitCode == 0 || !strings.Contains(p.Logs, "No space left") {
		t.Errorf("%s, %d: %s", p.Status, p.ExitCode, p.Logs)
	}
	is(t, c.Volumes.DeleteInstance(t.Context(), v.Name()), http.StatusConflict)
}
