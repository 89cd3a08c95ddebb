package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/extent"
)

// program runs a client of another maker and gives its output.
func program(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = t.TempDir() // fio leaves files
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, out, errs.Bytes())
	}
	return string(out)
}

// uri names an export on a unix socket.
func uri(name, socket string) string { return "nbd+unix:///" + name + "?socket=" + socket }

// scattered is an image with data and holes, and its content.
func scattered(t *testing.T, flags int) (*os.File, []byte) {
	t.Helper()
	f := image(t, 32*mib, flags)
	for n, at := range []int64{0, 2 * mib, 2*mib + 128<<10, 17 * mib, 32*mib - 64<<10} {
		_, err := f.WriteAt(pattern(64<<10, uint64(n)), at)
		must(t, err)
	}
	must(t, f.Sync())
	content, err := os.ReadFile(f.Name())
	must(t, err)
	return f, content
}

func sameContent(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("%s holds other bytes%s", filepath.Base(path), firstDifference(got, want))
	}
}

// both runs a test buffered and with direct I/O.
func both(t *testing.T, fn func(t *testing.T, flags int)) {
	for name, flags := range map[string]int{"buffered": 0, "direct": syscall.O_DIRECT} {
		t.Run(name, func(t *testing.T) { fn(t, flags) })
	}
}

func TestNbdinfo(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.NBD)
	both(t, func(t *testing.T, flags int) {
		f, _ := scattered(t, flags)
		_, socket := serving(t, Options{}, export(t, "disk one", f, ExportOptions{Description: "of a test"}), export(t, "two", image(t, mib, 0), ExportOptions{ReadOnly: true}))
		var info struct {
			Exports []struct {
				Name        string   `json:"export-name"`
				Description string   `json:"description"`
				Contexts    []string `json:"contexts"`
				Size        int64    `json:"export-size"`
				ReadOnly    bool     `json:"is_read_only"`
				MultiConn   bool     `json:"can_multi_conn"`
				FUA         bool     `json:"can_fua"`
				Flush       bool     `json:"can_flush"`
				Trim        bool     `json:"can_trim"`
				Zero        bool     `json:"can_zero"`
				FastZero    bool     `json:"can_fast_zero"`
				DF          bool     `json:"can_df"`
				Minimum     int      `json:"block_size_minimum"`
				Maximum     int      `json:"block_size_maximum"`
			} `json:"exports"`
			Structured bool `json:"structured"`
		}
		must(t, json.Unmarshal([]byte(program(t, "nbdinfo", "--json", "--list", uri("", socket))), &info))
		if len(info.Exports) != 2 || info.Exports[0].Name != "disk one" || info.Exports[1].Name != "two" {
			t.Fatalf("lists %+v", info.Exports)
		}
		one, two := info.Exports[0], info.Exports[1]
		if !info.Structured || one.Size != 32*mib || one.Description != "of a test" || !one.MultiConn || !one.FUA || !one.Flush || !one.Trim || !one.Zero || !one.FastZero || !one.DF || one.Maximum != maxPayload || len(one.Contexts) != 1 {
			t.Errorf("the first is %+v", one)
		}
		if (one.Minimum > 1) != (flags == syscall.O_DIRECT) {
			t.Errorf("the smallest block is %d", one.Minimum)
		}
		if !two.ReadOnly || two.Zero {
			t.Errorf("the second is %+v", two)
		}
		var ranges []struct {
			Offset int64 `json:"offset"`
			Length int64 `json:"length"`
			Type   int   `json:"type"`
		}
		must(t, json.Unmarshal([]byte(program(t, "nbdinfo", "--json", "--map", uri("disk%20one", socket))), &ranges))
		var data []extent.Range
		for _, r := range ranges {
			if r.Type == 0 {
				data = append(data, extent.Range{Offset: r.Offset, Length: r.Length})
			}
		}
		truth, err := extent.Map(t.Context(), f)
		must(t, err)
		if fmt.Sprint(data) != fmt.Sprint(truth) {
			t.Errorf("nbdinfo sees %v, the file has %v", data, truth)
		}
	})
}

// TestNbdcopy copies both ways over several connections.
func TestNbdcopy(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.NBD)
	both(t, func(t *testing.T, flags int) {
		from, content := scattered(t, flags)
		to := image(t, 32*mib, flags)
		_, err := to.WriteAt(pattern(mib, 9), 8*mib) // nbdcopy has to zero it
		must(t, err)
		_, socket := serving(t, Options{}, export(t, "from", from, ExportOptions{ReadOnly: true}), export(t, "to", to, ExportOptions{}))
		program(t, "nbdcopy", "--connections=4", "--flush", uri("from", socket), uri("to", socket))
		sameContent(t, to.Name(), content)
		out := filepath.Join(t.TempDir(), "out")
		program(t, "nbdcopy", uri("to", socket), out)
		sameContent(t, out, content)
		if data, err := extent.Map(t.Context(), to); err != nil || len(data) > 8 {
			t.Errorf("the copy has %d extents of data: holes were lost (%v)", len(data), err)
		}
	})
}

func TestQemuImg(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.NBD)
	both(t, func(t *testing.T, flags int) {
		f, content := scattered(t, flags)
		to := image(t, 32*mib, flags)
		_, socket := serving(t, Options{}, export(t, "from", f, ExportOptions{}), export(t, "to", to, ExportOptions{}))
		if out := program(t, "qemu-img", "info", "-f", "raw", uri("from", socket)); !strings.Contains(out, "33554432 bytes") {
			t.Errorf("qemu-img info: %s", out)
		}
		program(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", uri("from", socket), uri("to", socket))
		sameContent(t, to.Name(), content)
		program(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri("to", socket), f.Name())
		var ranges []struct {
			Start, Length int64
			Data          bool
		}
		must(t, json.Unmarshal([]byte(program(t, "qemu-img", "map", "--output=json", "-f", "raw", uri("from", socket))), &ranges))
		var data []extent.Range
		for _, r := range ranges {
			if r.Data {
				data = append(data, extent.Range{Offset: r.Start, Length: r.Length})
			}
		}
		truth, err := extent.Map(t.Context(), f)
		must(t, err)
		if fmt.Sprint(data) != fmt.Sprint(truth) {
			t.Errorf("qemu-img sees %v, the file has %v", data, truth)
		}
	})
}

func TestQemuIO(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.NBD)
	both(t, func(t *testing.T, flags int) {
		f := image(t, 16*mib, flags)
		_, socket := serving(t, Options{}, export(t, "", f, ExportOptions{}))
		out := program(t, "qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 64k", "-c", "write -f -P 0x5b 2M 64k", "-c", "flush",
			"-c", "read -P 0x5a 1M 64k", "-c", "write -z 1M 32k", "-c", "write -zu 2M 32k", "-c", "read -P 0 1M 32k", "-c", "read -P 0 2M 32k",
			"-c", "read -P 0x5b 2080k 32k", "-c", "discard 1M 64k", "-c", "aio_write -P 0x5c 3M 1M", "-c", "aio_flush", "-c", "read -P 0x5c 3M 1M",
			"-c", "write -P 0x5d 100 50", "-c", "read -P 0x5d 100 50", uri("", socket))
		if strings.Contains(out, "failed") {
			t.Errorf("qemu-io: %s", out)
		}
		if out := program(t, "sh", "-c", "qemu-io -f raw -c 'read 16M 4k' '"+uri("", socket)+"' 2>&1 || true"); !strings.Contains(out, "Input/output error") && !strings.Contains(out, "Invalid argument") {
			t.Errorf("past the end: %s", out)
		}
	})
}

// TestNbdkit puts nbdkit's client in the middle, with several connections.
func TestNbdkit(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.NBD)
	both(t, func(t *testing.T, flags int) {
		f, content := scattered(t, flags)
		_, socket := serving(t, Options{}, export(t, "x", f, ExportOptions{}))
		out := filepath.Join(t.TempDir(), "out")
		program(t, "nbdkit", "-U", "-", "nbd", "socket="+socket, "export=x", "--run",
			`nbdinfo --map "$uri" && nbdcopy "$uri" '`+out+`' && qemu-io -f raw -c 'write -P 7 5M 1M' -c 'flush' -c 'discard 6M 1M' -c 'write -z 2M 64k' "$uri"`)
		sameContent(t, out, content)
		copy(content[5*mib:], bytes.Repeat([]byte{7}, mib))
		clear(content[2*mib : 2*mib+64<<10])
		sameContent(t, f.Name(), content)
	})
}

// TestFio verifies what fio's NBD engine wrote, with many requests in flight.
func TestFio(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.NBD)
	both(t, func(t *testing.T, flags int) {
		f := image(t, 32*mib, flags)
		_, socket := serving(t, Options{}, export(t, "", f, ExportOptions{}))
		for _, args := range [][]string{
			{"--rw=randwrite", "--bs=4k", "--iodepth=32", "--verify=crc32c", "--fsync=64"},
			{"--rw=write", "--bs=1m", "--iodepth=8", "--verify=crc32c"},
			{"--rw=randrw", "--bsrange=4k-256k", "--iodepth=16"},
			{"--rw=randtrim", "--bs=64k", "--iodepth=4"},
		} {
			program(t, append([]string{"fio", "--name=x", "--ioengine=nbd", "--uri=" + uri("", socket), "--size=32m"}, args...)...)
		}
	})
}

func TestOthersOverTLS(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.NBD)
	a := newAuthority(t)
	f, content := scattered(t, 0)
	addr := servingTCP(t, Options{TLS: a.serverConfig()}, export(t, "x", f, ExportOptions{}))
	a.sign("client")
	out := filepath.Join(t.TempDir(), "out")
	program(t, "nbdcopy", fmt.Sprintf("nbds://localhost:%d/x?tls-certificates=%s", addr.Port, a.dir), out)
	sameContent(t, out, content)
	program(t, "qemu-img", "compare", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+a.dir, "--image-opts",
		fmt.Sprintf("driver=raw,file.driver=nbd,file.host=localhost,file.port=%d,file.export=x,file.tls-creds=t", addr.Port), "driver=raw,file.driver=file,file.filename="+f.Name())
	refused := exec.Command("nbdinfo", fmt.Sprintf("nbd://localhost:%d/x", addr.Port))
	if said, err := refused.CombinedOutput(); err == nil {
		t.Errorf("served in the clear: %s", said)
	}
}
