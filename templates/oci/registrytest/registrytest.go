package registrytest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec" //nolint:depguard // this package exists for tests
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"

	"holdfast/blockdev/blockdevtest"
	"holdfast/templates/archivetest"
)

// User and Password are of a registry with a password.
const (
	User     = "holdfast"
	Password = "of-the-registry"
	// bcrypt of the password, as htpasswd(1) writes it: the only form that the server takes
	hashed = `$2y$04$abcdefghijklmnopqrstuu3X5g8MvdKZ6GWTnKisKCCyAWjIZFdqa`
)

// Options change how the server runs.
type Options struct {
	Password bool   // ask for User and Password
	Redirect string // base URL that blobs are redirected to
}

// Server is a registry that runs until the test's end.
type Server struct {
	Host string // "127.0.0.1:PORT"
	t    testing.TB
	dir  string
	cmd  *exec.Cmd
	o    Options
}

const patience = time.Minute

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)`)

// Start starts a registry without images.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Registry)
	s := &Server{t: t, dir: t.TempDir(), o: o}
	config := fmt.Sprintf("version: 0.1\nlog: {level: info, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: \"127.0.0.1:0\", secret: test}\n", s.dir)
	if o.Password {
		file := filepath.Join(s.dir, "htpasswd")
		s.write(file, User+":"+hashed+"\n")
		config += fmt.Sprintf("auth: {htpasswd: {realm: test, path: %q}}\n", file)
	}
	if o.Redirect != "" {
		config += fmt.Sprintf("middleware: {storage: [{name: redirect, options: {baseurl: %q}}]}\n", o.Redirect)
	}
	s.write(filepath.Join(s.dir, "config.yml"), config)
	s.start()
	return s
}

func (s *Server) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func (s *Server) start() {
	s.t.Helper()
	s.cmd = exec.Command("docker-registry", "serve", filepath.Join(s.dir, "config.yml"))
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	s.cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	stderr, err := s.cmd.StderrPipe()
	if err == nil {
		err = s.cmd.Start()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait() // it was killed
	})
	found := make(chan string, 1)
	go func() {
		var said strings.Builder
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			said.WriteString(lines.Text() + "\n")
			if m := listening.FindStringSubmatch(lines.Text()); m != nil {
				found <- m[1]
				_, _ = io.Copy(io.Discard, stderr) // until it ends
				return
			}
		}
		found <- "the registry ended: " + said.String()
	}()
	select {
	case s.Host = <-found:
		if !strings.HasPrefix(s.Host, "127.0.0.1:") {
			s.t.Fatal(s.Host)
		}
	case <-time.After(patience):
		s.t.Fatal("the registry does not come up")
	}
}

// Pause stops the server where it is, and lets it go on.
func (s *Server) Pause() (goOn func()) {
	s.t.Helper()
	blockdevtest.StandStill(s.t, s.cmd.Process.Pid)
	return func() { _ = s.cmd.Process.Signal(syscall.SIGCONT) }
}

// Push puts an image, or an index of images, of a layout into the registry and
// gives its reference.
func (s *Server) Push(name string, l *archivetest.Layout, d ocispec.Descriptor) string {
	s.t.Helper()
	ctx := s.t.Context()
	repository, err := remote.NewRepository(s.Host + "/" + name)
	if err != nil {
		s.t.Fatal(err)
	}
	repository.PlainHTTP = true
	if s.o.Password {
		repository.Client = &auth.Client{Credential: auth.StaticCredential(s.Host, auth.Credential{Username: User, Password: Password})}
	}
	if err := oras.CopyGraph(ctx, files{l}, repository, d, oras.DefaultCopyGraphOptions); err != nil {
		s.t.Fatal(err)
	}
	if err := repository.Tag(ctx, d, repository.Reference.ReferenceOrDefault()); err != nil {
		s.t.Fatal(err)
	}
	return s.Host + "/" + name
}

// files are a layout's blobs as oras reads them.
type files struct{ *archivetest.Layout }

func (f files) blob(d ocispec.Descriptor) ([]byte, bool) {
	b, ok := f.Files["blobs/"+d.Digest.Algorithm().String()+"/"+d.Digest.Encoded()]
	return b, ok
}

func (f files) Fetch(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	b, ok := f.blob(d)
	if !ok {
		return nil, errdef.ErrNotFound
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

func (f files) Exists(_ context.Context, d ocispec.Descriptor) (bool, error) {
	_, ok := f.blob(d)
	return ok, nil
}

// PushIndex puts an index of images into the registry.
func (s *Server) PushIndex(name string, l *archivetest.Layout, images ...ocispec.Descriptor) string {
	s.t.Helper()
	l.Index.Manifests = images
	return s.Push(name, l, l.PutIndex())
}

// Blob is where the server keeps a blob, for a test that damages it.
func (s *Server) Blob(d digest.Digest) string {
	return filepath.Join(s.dir, "docker/registry/v2/blobs", d.Algorithm().String(), d.Encoded()[:2], d.Encoded(), "data")
}
