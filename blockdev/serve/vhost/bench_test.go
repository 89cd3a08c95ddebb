package vhost_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev/serve/vhost/frontend"
)

// startServer has this program serve an image in a process of its own, until the
// test ends or this process does.
func startServer(t testing.TB, image, socket string) *exec.Cmd {
	t.Helper()
	server := exec.Command("/proc/self/exe")
	server.Env = append(os.Environ(), servedImage+"="+image, servedSocket+"="+socket)
	server.SysProcAttr = endWithParent
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	return server
}

// cpuTicks is the processor time of a process, in hundredths of a second.
func cpuTicks(t testing.TB, pid int) (ticks int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+2:]))
	var user, system int
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		t.Fatal(err)
	}
	return user + system
}

// BenchmarkRead4k reads at random, and tells what that costs the server.
func BenchmarkRead4k(b *testing.B) {
	const size = 256 << 20
	image, socket := filepath.Join(b.TempDir(), "image"), filepath.Join(b.TempDir(), "s")
	data := make([]byte, 1<<20)
	f, err := os.Create(image)
	if err != nil {
		b.Fatal(err)
	}
	for at := int64(0); at < size; at += int64(len(data)) {
		for n := range data {
			data[n] = byte(rand.Uint32())
		}
		if _, err := f.WriteAt(data, at); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	f.Close()
	server := startServer(b, image, socket)
	defer func() {
		_ = server.Process.Kill()
		_ = server.Wait() // killed, as wanted
	}()
	for _, depth := range []int{1, 8, 32} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			fe, err := frontend.New(frontend.Options{Depth: depth})
			if err != nil {
				b.Fatal(err)
			}
			defer fe.Close()
			connectWhenThere(b, fe, socket)
			q, before := fe.Queues[0], cpuTicks(b, server.Process.Pid)
			put := func(slot int) { q.Put(slot, frontend.Read, uint64(rand.Uint32()%(size/block))*(block/512), block) }
			b.ResetTimer()
			begun, done := 0, 0
			for ; begun < min(depth, b.N); begun++ {
				put(begun)
			}
			for done < b.N {
				if err := q.Show(); err != nil {
					b.Fatal(err)
				}
				if err := q.Wait(); err != nil {
					b.Fatal(err)
				}
				for slot, status, ok := q.Take(); ok; slot, status, ok = q.Take() {
					if status != 0 {
						b.Fatalf("status %d", status)
					}
					if done++; begun < b.N {
						put(slot)
						begun++
					}
				}
			}
			b.ReportMetric(float64(cpuTicks(b, server.Process.Pid)-before)*1e4/float64(b.N), "server-cpu-µs/op")
		})
	}
}
