package sandbox_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"holdfast/api/client"
)

// TestInside has what can be asked of one daemon: each part has sandboxes of its own.
func TestInside(t *testing.T) {
	image := t.TempDir()
	r := start(t, "--sandbox-max", "4", "--sandbox-memory", "256MiB", "--sandbox-images", "custom="+hostileImage(t, image)+",team/layout=oci:"+layout(t, image)+"#app:1")
	for name, test := range map[string]func(*rig){
		"system calls": systemCalls, "a hostile image": hostile, "limits": bounds, "errors": refusals, "raw requests": rawRequests, "many at once": many, "container image": containerImage,
	} {
		t.Run(name, func(t *testing.T) {
			sub := *r
			sub.T = t
			test(&sub)
			for _, s := range sub.list() {
				sub.end(s)
			}
		})
	}
}

func (r *rig) list() (names []string) {
	r.Helper()
	all, err := r.Client.Sandboxes(r.ctx)
	r.must(err)
	for _, s := range all {
		names = append(names, s.Metadata.Name)
	}
	return names
}

func (r *rig) end(name string) {
	r.Helper()
	_, err := r.Client.DeleteSandbox(r.ctx, name)
	r.must(err)
	r.must(r.Client.AwaitSandboxGone(r.ctx, name))
}

// systemCalls runs a program that makes the system calls a sandbox must not make.
func systemCalls(r *rig) {
	if runtime.GOARCH != "amd64" {
		r.Skip("the probe has x86-64's numbers")
	}
	probe := filepath.Join(r.TempDir(), "probe")
	build := exec.Command("go", "build", "-o", probe, "./testdata/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		r.Fatalf("%v\n%s", err, out)
	}
	program, err := os.ReadFile(probe)
	r.must(err)
	r.box("calls")
	form := "--x\r\nContent-Disposition: form-data; name=\"permissions\"\r\n\r\n0755\r\n" +
		"--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n" + string(program) + "\r\n--x--\r\n"
	if status, answer := r.raw("PUT /sandboxes/calls/run/filesystem/%2Ftmp%2Fprobe", form, "Content-Type: multipart/form-data; boundary=x"); status != 200 {
		r.Fatalf("%d %v", status, answer)
	}
	if got := r.sh("calls", "/tmp/probe"); got != "done\n" {
		r.Errorf("these went through, or failed for another reason:\n%s", got)
	}
}

// hostileImage is a root filesystem whose symbolic links lead out of it.
func hostileImage(t *testing.T, dir string) string {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("no busybox")
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(dir, "outside")
	root := filepath.Join(dir, "root")
	for _, d := range []string{outside, root, filepath.Join(root, "bin"), filepath.Join(root, "etc"), filepath.Join(root, "tmp")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{"out": outside, "up": "../../../../../../.." + outside, "etc/loop": "loop", "inner": "etc"} {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "bin/sh"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	return root
}

func hostile(r *rig) {
	r.volume("data", 8)
	try := func(path string) error {
		s := newBox("evil", at(path, "data"))
		s.Spec.Runtime.Image = "custom:latest"
		_, err := r.Client.CreateSandbox(r.ctx, s)
		return err
	}
	for _, path := range []string{"/out", "/out/x", "/up/x", "/etc/loop/x", "/inner/x"} {
		if err := try(path); client.Status(err) != 400 || !strings.Contains(err.Error(), "mountPath") {
			r.Errorf("%s: %v", path, err)
		}
	}
	r.must(try("/etc/new/place"))
	if got := r.sh("evil", "pwd; echo hidden > /etc/new/place/f; cat /etc/new/place/f; echo changed > /etc/here"); got != "/\nhidden\n" {
		r.Errorf("%q", got)
	}
	for _, name := range []string{"out", "up"} {
		_, err := r.Client.Exec(r.ctx, "evil", client.Exec{Command: "echo x > /" + name + "/x", Wait: true})
		r.must(err)
	}
	r.end("evil")
	_, err := r.Client.DeleteVolume(r.ctx, "data")
	r.must(err)
}

func bounds(r *rig) {
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			if _, err := r.Client.CreateSandbox(r.ctx, newBox(fmt.Sprintf("n-%d", i))); err != nil {
				r.Error(err)
			}
		})
	}
	wg.Wait()
	_, err := r.Client.CreateSandbox(r.ctx, newBox("one-more"))
	if client.Status(err) != 403 || !strings.Contains(err.Error(), "at most 4") {
		r.Errorf("a fifth sandbox: %v", err)
	}
	maps := map[string]bool{}
	for i := range 4 {
		maps[r.sh(fmt.Sprintf("n-%d", i), "cat /proc/self/uid_map")] = true
	}
	if len(maps) != 4 {
		r.Errorf("sandboxes share users: %v", maps)
	}
	r.end("n-1")
	s := newBox("big")
	s.Spec.Runtime.Memory = 1 << 20
	made, err := r.Client.CreateSandbox(r.ctx, s)
	r.must(err)
	if made.Spec.Runtime.Memory != 256 {
		r.Errorf("memory %d MiB", made.Spec.Runtime.Memory)
	}
	// A process that takes more than that is killed; the sandbox is not.
	p, err := r.Client.Exec(r.ctx, "big", client.Exec{Command: "dd if=/dev/zero of=/dev/null bs=300M count=1", Wait: true})
	r.must(err)
	if p.ExitCode == 0 {
		r.Error("300 MiB of 256 were to be had")
	}
	r.sh("big", "true")
}

func refusals(r *rig) {
	r.box("here")
	for line, want := range map[string]int{
		"POST /sandboxes/here/run/process":                             400, // no command
		"GET /sandboxes/there/run/process":                             404,
		"GET /sandboxes/here/run/process/999":                          404,
		"GET /sandboxes/here/run/process/999/logs":                     404,
		"GET /sandboxes/here/run/process/999/logs/stream":              404,
		"DELETE /sandboxes/here/run/process/999":                       404,
		"DELETE /sandboxes/here/run/process/999/kill":                  404,
		"POST /sandboxes/here/run/process/999/stdin":                   404,
		"GET /sandboxes/here/run/filesystem/%2Fnothing":                404,
		"DELETE /sandboxes/here/run/filesystem/%2F":                    400,
		"DELETE /sandboxes/here/run/filesystem/%2Fetc":                 409, // not empty
		"PUT /sandboxes/here/run/filesystem/%2Fetc":                    409, // a directory
		"PUT /sandboxes/here/run/filesystem/%2Fproc%2Fnew":             409,
		"DELETE /sandboxes/here/run/filesystem-multipart/abc/abort":    404,
		"POST /sandboxes?createIfNotExist=perhaps":                     400,
		"GET /sandboxes?limit=0":                                       400,
		"GET /sandboxes?cursor=x":                                      400,
		"GET /sandboxes?status=odd":                                    400,
		"PUT /sandboxes/there":                                         404,
		"GET /sandboxes/by-external-id/none":                           404,
		"GET /sandboxes/here/run/filesystem-content-search/%2F":        404,
		"DELETE /sandboxes/here/run/filesystem/%2Fx?recursive=perhaps": 400,
	} {
		var body any
		if strings.HasPrefix(line, "P") {
			body = "{}"
		}
		var headers []string
		if strings.HasSuffix(line, "/stdin") {
			headers = []string{"Content-Type: application/octet-stream"}
		}
		if status, answer := r.raw(line, body, headers...); status != want {
			r.Errorf("%s: %d %v, want %d", line, status, answer, want)
		}
	}
	for body, want := range map[string]string{
		`{"spec":{"runtime":{"memory":"x"}}}`:                                     "spec.runtime.memory",
		`{"metadata":{"name":"by-external-id"}}`:                                  "reserved",
		`{"metadata":{"externalId":"a b"}}`:                                       "externalId",
		`{"spec":{"volumes":[{"name":"x","mountPath":"/x","type":"odd"}]}}`:       "type",
		`{"spec":{"volumes":[{"name":"x","mountPath":"/x","type":"ephemeral"}]}}`: "sizeMb",
		`{"spec":{"volumes":[{"mountPath":"/x"}]}}`:                               "name",
		`[]`: "body",
	} {
		status, answer := r.raw("POST /sandboxes", body)
		if status != 400 || answer["code"] != "INVALID_REQUEST" || !strings.Contains(fmt.Sprint(answer["message"]), want) {
			r.Errorf("%s: %d %v", body, status, answer)
		}
	}
	status, answer := r.raw("PUT /sandboxes/here", `{"spec":{"runtime":{"image":"another"}}}`)
	if status != 400 || answer["code"] != 400.0 {
		r.Errorf("%d %v", status, answer)
	}
	// What a client got back it may send again.
	_, whole := r.raw("GET /sandboxes/here", nil)
	if status, answer := r.raw("PUT /sandboxes/here", whole); status != 200 {
		r.Errorf("%d %v", status, answer)
	}
}

// rawRequests are bodies as clients in other languages send them.
func rawRequests(r *rig) {
	r.volume("data", 8)
	// The CLI of the original applies a manifest: POST, and after 409 PUT of the same.
	manifest := `{"apiVersion":"blaxel.ai/v1alpha1","kind":"Sandbox","metadata":{"name":"cli","labels":{"a":"b"}},
		"spec":{"runtime":{"image":"blaxel/base-image:latest","memory":4096,"ports":[{"name":"web","target":3000,"protocol":"HTTP"}]},
		"volumes":[{"name":"data","mountPath":"/data"}]}}`
	status, made := r.raw("POST /sandboxes", manifest)
	if status != 200 || made["status"] != "DEPLOYED" {
		r.Fatalf("%d %v", status, made)
	}
	status, again := r.raw("POST /sandboxes", manifest)
	if status != 409 || again["code"] != "SANDBOX_ALREADY_EXISTS" || again["status_code"] != 409.0 {
		r.Errorf("%d %v", status, again)
	}
	if status, answer := r.raw("PUT /sandboxes/cli", manifest); status != 200 {
		r.Errorf("%d %v", status, answer)
	}
	if status, answer := r.raw("POST /sandboxes?createIfNotExist=true", manifest); status != 200 {
		r.Errorf("%d %v", status, answer)
	}
	// Python sends null for what is not set.
	status, answer := r.raw("PUT /sandboxes/cli", `{"metadata":{"name":"cli","displayName":null,"labels":null,"externalId":null},"spec":{"region":null,"volumes":null,"runtime":{"image":null,"memory":null,"envs":null,"ports":null},"lifecycle":null}}`)
	if status != 200 || fmt.Sprint(answer["metadata"].(map[string]any)["labels"]) != "map[a:b]" {
		r.Errorf("%d %v", status, answer)
	}
	status, answer = r.raw("POST /sandboxes/cli/run/process", `{"command":"echo $A; cat /data/f","env":{"A":"b"},"name":null,"workingDir":null,"timeout":null,"waitForCompletion":true,"keepAlive":false,"unknown":1}`)
	if status != 200 || answer["status"] != "failed" || answer["stdout"] != "b\n" {
		r.Errorf("%d %v", status, answer)
	}
	for _, step := range []string{
		`PUT /sandboxes/cli/run/filesystem/%2Fdata%2Ff {"content":"text","permissions":"0600"}`,
		`PUT /sandboxes/cli/run/filesystem/%2Fdata%2Fd {"isDirectory":true,"permissions":"0700"}`,
		`PUT /sandboxes/cli/run/filesystem/tree/%2Fdata%2Ft {"files":{"a/b":"1"}}`,
		`GET /sandboxes/cli/run/filesystem/%2Fdata`,
		`GET /sandboxes/cli/run/filesystem/%2Fdata%2Ff`,
		`GET /sandboxes/cli/run/process`,
		`DELETE /sandboxes/cli/run/filesystem/%2Fdata%2Fd`,
		`GET /sandboxes?sort=name:desc&limit=1&q=cl&status=DEPLOYED,FAILED&label=a=b`,
		`GET /sandboxes?showTerminated=true`,
	} {
		line, body, _ := strings.Cut(step, " {")
		var sent any
		if body != "" {
			sent = "{" + body
		}
		if status, answer := r.raw(line, sent); status != 200 {
			r.Errorf("%s: %d %v", step, status, answer)
		}
	}
	if got := r.sh("cli", "stat -c %a /data/f; cat /data/f /data/t/a/b; ls /data"); got != "600\ntext1f\nlost+found\nt\n" {
		r.Errorf("%q", got)
	}
	if status, answer := r.raw("GET /sandboxes", nil, "Blaxel-Version: 2026-04-16"); status != 200 || !strings.HasPrefix(fmt.Sprint(answer["text"]), `[{"metadata"`) {
		r.Errorf("%d %v", status, answer)
	}
	status, answer = r.raw("DELETE /sandboxes/cli", nil)
	if status != 200 || answer["status"] != "DELETING" {
		r.Errorf("%d %v", status, answer)
	}
	r.must(r.Client.AwaitSandboxGone(r.ctx, "cli"))
	_, err := r.Client.DeleteVolume(r.ctx, "data")
	r.must(err)
}

// many runs commands in parallel, of which some say more than is kept.
func many(r *rig) {
	r.box("busy")
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			p, err := r.Client.Exec(r.ctx, "busy", client.Exec{Command: fmt.Sprintf("dd if=/dev/zero bs=1M count=%d 2>/dev/null | tr '\\0' x; echo; exit %d", i%4, i), Wait: true})
			if err != nil {
				r.Error(err)
				return
			}
			said := i%4<<20 + 1
			if p.ExitCode != i || len(p.Stdout) > 1<<20 || p.Truncated != (len(p.Stdout) < said) {
				r.Errorf("%d: exit code %d, %d bytes, truncated %v", i, p.ExitCode, len(p.Stdout), p.Truncated)
			}
		})
	}
	wg.Wait()
	r.sh("busy", "for i in $(seq 20); do (sleep 0.01 &); done")
	r.await("the end of all orphans", func() bool {
		return strings.TrimSpace(r.sh("busy", "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '; true")) == "0"
	})
}

// TestWithoutUserNamespaces: as on a kernel that has none to give.
func TestWithoutUserNamespaces(t *testing.T) {
	r := start(t, "--sandbox-users", "0")
	r.volume("data", 8)
	r.box("web", at("/data", "data"))
	if got := r.sh("web", "cat /proc/self/uid_map | tr -s ' '; touch /data/f; stat -c %u /data/f /"); got != " 0 0 4294967295\n0\n0\n" {
		t.Errorf("%q", got)
	}
	for _, command := range []string{"mount -t tmpfs x /mnt", "unshare -U true", "mknod /tmp/d b 7 0 && cat /tmp/d", "dmesg", "echo x > /proc/sys/kernel/hostname", "chown 1:1 /.holdfast/busybox", "ls /sys/kernel"} {
		p, err := r.Client.Exec(r.ctx, "web", client.Exec{Command: command, Wait: true})
		r.must(err)
		if p.ExitCode == 0 {
			t.Errorf("%s: %s", command, p.Stdout)
		}
	}
	if got := r.sh("web", "grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status | tr '\t' ' '"); got != "CapEff: 00000000000405fb\nNoNewPrivs: 1\nSeccomp: 2\n" {
		t.Errorf("%q", got)
	}
}

// layout makes a container image of two layers, as docker save writes it.
func layout(t *testing.T, dir string) string {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("no busybox")
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	type entry = tar.Header
	first := tarOf(t, map[*entry]string{
		{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}:                                              "",
		{Name: "bin/sh", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program))}:                 string(program),
		{Name: "app/", Typeflag: tar.TypeDir, Mode: 0o750, Uid: 1000, Gid: 1001}:                        "",
		{Name: "app/old", Typeflag: tar.TypeReg, Mode: 0o644, Size: 3}:                                  "old",
		{Name: "app/tool", Typeflag: tar.TypeReg, Mode: 0o4755, Size: 4}:                                "tool",
		{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}:                                             "",
		{Name: "app/link", Typeflag: tar.TypeSymlink, Linkname: "../../../../../../../../etc/hostname"}: "",
		{Name: "app/zz-hard", Typeflag: tar.TypeLink, Linkname: "app/tool"}:                             "",
	})
	second := tarOf(t, map[*entry]string{
		{Name: "app/.wh.old", Typeflag: tar.TypeReg}:                           "",
		{Name: "app/new", Typeflag: tar.TypeReg, Mode: 0o600, Uid: 7, Size: 4}: "new\n",
	})
	sum := func(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }
	config := fmt.Appendf(nil, `{"architecture":%q,"os":"linux","config":{"Env":["PATH=/bin","FROM=image"],"WorkingDir":"/app","User":"1000"},"rootfs":{"type":"layers","diff_ids":["sha256:%s","sha256:%s"]}}`,
		runtime.GOARCH, sum(first), sum(second))
	manifest := fmt.Appendf(nil, `[{"Config":%q,"RepoTags":["app:1"],"Layers":["1.tar","2.tar"]}]`, sum(config)+".json")
	saved := tarOf(t, map[*entry]string{
		{Name: "1.tar", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(first))}:                string(first),
		{Name: "2.tar", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(second))}:               string(second),
		{Name: "manifest.json", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(manifest))}:     string(manifest),
		{Name: sum(config) + ".json", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(config))}: string(config),
	})
	name := filepath.Join(dir, "image.tar")
	if err := os.WriteFile(name, saved, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// tarOf writes entries in the order of their names.
func tarOf(t *testing.T, entries map[*tar.Header]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	headers := slices.SortedFunc(maps.Keys(entries), func(a, b *tar.Header) int { return strings.Compare(a.Name, b.Name) })
	for _, h := range headers {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(entries[h])); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func containerImage(r *rig) {
	for _, name := range []string{"one", "two"} { // unpacked once, changed by one
		s := newBox(name)
		s.Spec.Runtime.Image = "team/layout:whatever"
		_, err := r.Client.CreateSandbox(r.ctx, s)
		r.must(err)
		want := "/app\nimage\n1000:1001 750\n0:0 4755\n7:0 600\n2\n../../../../../../../../etc/hostname\nnew\nlink new tool zz-hard \n"
		got := r.sh(name, `pwd; echo $FROM; b=/.holdfast/busybox; for f in /app /app/tool /app/new; do $b stat -c '%u:%g %a' $f; done; $b stat -c %h /app/tool; $b readlink /app/link; $b cat /app/new; $b ls /app | $b tr '\n' ' '; echo`)
		if got != want {
			r.Errorf("%s: %q, want %q", name, got, want)
		}
		r.sh(name, "/.holdfast/busybox rm -rf /app/new; echo mine > /app/mine")
	}
	if found, err := filepath.Glob(filepath.Join(r.State, "sandboxes/images/oci-*")); err != nil || len(found) != 2 { // the tree and its settings
		r.Errorf("%v %v", found, err)
	}
}
