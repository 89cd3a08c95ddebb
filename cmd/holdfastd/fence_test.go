package main_test

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/vhost/frontend"
	"holdfast/internal/sys"
)

// ask makes one request of a disk and gives its status.
func ask(t *testing.T, q *frontend.Queue, kind uint32, length int) byte {
	t.Helper()
	q.Put(0, kind, 0, length)
	must(t, errors.Join(q.Show(), q.Wait()))
	_, status, ok := q.Take()
	if !ok {
		t.Fatal("no answer")
	}
	return status
}

// TestForceEndsTheWorker: a client of a disk that does not hang up loses its worker, one that
// answers nobody as well, and nothing that it was told was written. It meets who
// refuses where it was, and never the next one's worker. The daemon is not in the way of any of it when it is killed.
func TestForceEndsTheWorker(t *testing.T) {
	const block = 4096
	for name, stopped := range map[string]bool{"answers": false, "stands still": true} {
		t.Run(name, func(t *testing.T) {
			x := newExports(t)
			ctx := t.Context()
			x.layered("work", 16)
			a, err := x.export("work", "vhost-user", "work", nil)
			must(t, err)
			f, err := frontend.New(frontend.Options{Inflight: true})
			must(t, err)
			defer f.Close()
			q := f.Queues[0]
			defer context.AfterFunc(ctx, q.Abandon)()
			must(t, f.Connect(a.Socket))
			content := bytes.Repeat([]byte{7}, block)
			copy(q.Data(0), content)
			if status := ask(t, q, frontend.Write, block); status != 0 {
				t.Fatalf("a write has status %d", status)
			}
			_, err = x.Detach(ctx, "work", a.ID)
			x.refused(err, "CONFLICT", "a client is connected")
			worker := workerOf(t, a.Socket)
			if stopped {
				blockdevtest.StandStill(t, worker)
			}
			type answer struct {
				client.Attachment
				error
			}
			gone := make(chan answer, 1)
			go func() {
				a, err := x.ForceDetach(ctx, "work", a.ID)
				gone <- answer{a, err}
			}()
			ended, err := sys.OpenPidfd(worker)
			must(t, err)
			defer ended.Close()
			bounded, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			must(t, sys.AwaitEnd(bounded, ended))
			f.Hangup()
			connectAgain(t, f, a.Socket)
			for _, kind := range []uint32{frontend.Write, frontend.Read} {
				copy(q.Data(0), bytes.Repeat([]byte{8}, block))
				if status := ask(t, q, kind, block); status != 1 {
					t.Errorf("request %d has status %d of who refuses", kind, status)
				}
			}
			if said := <-gone; said.error != nil || said.Fenced != "worker" {
				t.Fatalf("by force: %+v", said)
			}
			v, err := x.Volume(ctx, "work")
			must(t, err)
			if last := v.Events[len(v.Events)-1].Message; !strings.Contains(last, "by force: its worker was ended") || len(v.State.Attachments) > 0 {
				t.Errorf("it says %q, attached are %+v", last, v.State.Attachments)
			}
			x.kill()
			x.start()

			b, err := x.export("work", "nbd", "next", nil)
			must(t, err)
			nbd := blockdevtest.DialNBD(t, b.Socket)
			got := make([]byte, block)
			if _, err := nbd.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
				t.Errorf("what was acknowledged reads as %x, %v", got[:4], err)
			}
			f.Hangup()
			must(t, f.Connect(a.Socket))
			copy(q.Data(0), bytes.Repeat([]byte{9}, block))
			if status := ask(t, q, frontend.Write, block); status != 1 {
				t.Errorf("a write has status %d after the next attachment", status)
			}
			if _, err := nbd.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
				t.Errorf("it was written by who had lost it: %x, %v", got[:4], err)
			}
			must(t, nbd.Close())
			if _, err := x.Detach(ctx, "work", b.ID); err != nil {
				t.Error(err)
			}
			if left, err := filepath.Glob(filepath.Join(x.dir, "*")); err != nil || len(left) > 0 {
				t.Errorf("links are left: %v, %v", left, err)
			}
		})
	}
}

// TestForceEndsOneReader: one of several readers over TLS loses its connection, and
// another one goes on.
func TestForceEndsOneReader(t *testing.T) {
	a := newAuthority(t)
	n, ctx := exportingNode(t, a), t.Context()
	mine := a.sign("client", "backup")
	n.create("v", client.VolumeSpec{Size: 16})
	var at []client.Attachment
	var files []blockdevtest.File
	for _, holder := range []string{"agent:one", "agent:two"} {
		one, err := n.Attach(ctx, "v", client.Attachment{Holder: holder, ReadOnly: true, Target: client.Target{Type: "export", Protocol: "nbd", Transport: "tls"}})
		must(t, err)
		address, name := place(t, one)
		f, err := blockdevtest.DialNBDS(address, name, a.client(mine))
		must(t, err)
		defer f.Close()
		at, files = append(at, one), append(files, f)
	}
	if _, err := n.Detach(ctx, "v", at[0].ID); err == nil || !strings.Contains(err.Error(), "a client is connected") {
		t.Errorf("detached under a client: %v", err)
	}
	worker := workerOf(t, at[1].Socket)
	gone, err := n.ForceDetach(ctx, "v", at[0].ID)
	if err != nil || gone.Fenced != "worker" {
		t.Fatalf("by force: %+v, %v", gone, err)
	}
	b := make([]byte, 4096)
	if _, err := files[0].ReadAt(b, 0); err == nil {
		t.Error("the one that lost it reads")
	}
	if _, err := files[1].ReadAt(b, 0); err != nil || workerOf(t, at[1].Socket) != worker {
		t.Errorf("the other one: %v", err)
	}
	_, name := place(t, at[0])
	address, _ := place(t, at[1])
	if f, err := blockdevtest.DialNBDS(address, name, a.client(mine)); err == nil {
		must(t, f.Close())
		t.Error("the name of the one that is gone is known to the other's port")
	}
	must(t, files[1].Close())
	if _, err := n.Detach(ctx, "v", at[1].ID); err != nil {
		t.Error(err)
	}
}
