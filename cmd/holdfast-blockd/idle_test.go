package main_test

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/vhost/frontend"
)

// ticks are what a process has used of the processor.
func ticks(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + itoa(pid) + "/stat")
	must(t, err)
	return strings.Join(strings.Fields(string(b))[13:15], "+")
}

// mostResident is what an idle worker may have in memory, in kB, what all workers share
// of the program among it.
const mostResident = 8 << 10

// TestIdleWorkers holds workers that wait to what they may occupy, with a client each
// that has used the volume.
func TestIdleWorkers(t *testing.T) {
	s, ctx := starter(t, nil), t.Context()
	for name, spec := range map[string]control.Spec{
		"flat, vhost-user":    flat(t, blockdev.VhostUser),
		"flat, NBD":           flat(t, blockdev.NBD),
		"layered, vhost-user": {ID: volumeID, Kind: blockdev.VhostUser, Size: size, Layers: []control.Layer{layer(t)}, Base: base(t), BaseSize: size},
		"layered, NBD":        {ID: volumeID, Kind: blockdev.NBD, Size: size, Layers: []control.Layer{layer(t)}, Base: base(t), BaseSize: size},
	} {
		w, err := s.Serve(ctx, spec)
		must(t, err)
		show := func(when string) {
			t.Logf("%s, %s: resident %s: anonymous %s, files %s; %s threads; %s ticks", name, when, procStatus(t, w.Pid(), "VmRSS"), procStatus(t, w.Pid(), "RssAnon"), procStatus(t, w.Pid(), "RssFile"), procStatus(t, w.Pid(), "Threads"), ticks(t, w.Pid()))
		}
		show("alone")
		if spec.Kind == blockdev.NBD {
			c := dialNBD(t, w.Socket())
			c.write(0, stamped(1))
			c.flush()
		} else {
			g := newGuest(t, frontend.Options{})
			must(t, g.f.Connect(w.Socket()))
			g.good(frontend.Write, 0, block)
			g.good(frontend.Flush, 0, 0)
		}
		show("with a client")
		kb, err := strconv.Atoi(strings.Fields(procStatus(t, w.Pid(), "VmRSS"))[0])
		must(t, err)
		if kb > mostResident {
			t.Errorf("%s: %d kB are resident", name, kb)
		}
		must(t, w.Stop(ctx))
	}
}
