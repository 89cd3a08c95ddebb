package api

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"
	"unicode/utf8"

	"holdfast/blockdev/filesystem"
	"holdfast/templates"
)

// receiveUpload takes a template's archive, as ?format= says that it is packed or
// by its contents: clients of the contract always say application/x-tar. The signed URL is the authority:
// clients send no key here. Success is exactly 200, after the version is READY.
func receiveUpload(c *call) error { return c.receive(c.s.o.Library.Ingest) }

// receive hands the body of an upload to the library and answers with the version.
func (c *call) receive(ingest func(context.Context, templates.Upload, int64, io.Reader) (templates.Revision, error)) error {
	upload, err := c.upload()
	if err != nil {
		return err
	}
	if err := c.uploadPlace(); err != nil {
		return err
	}
	defer func() { <-c.s.uploads }()
	c.s.metrics.uploading.Inc()
	defer c.s.metrics.uploading.Dec()
	rev, err := ingest(c.r.Context(), upload, c.r.ContentLength, c.patientBody())
	if err != nil {
		return err
	}
	c.workspace = rev.Workspace
	return c.answerVersion(rev)
}

func (c *call) answerVersion(rev templates.Revision) error {
	c.resource = rev.Template + ":" + rev.Name
	c.extendWrite()
	return c.json(versionBody(rev))
}

// fetchVersion makes a version of the template in the path of something that the server
// fetches, in one of the places of uploads: body is read, and check finds it good first.
func (c *call) fetchVersion(body any, check func() error, fetch func(ctx context.Context, template string) (templates.Revision, error)) error {
	name := c.r.PathValue("name")
	if !validName(name) {
		return invalid("metadata.name", nameRule)
	}
	c.resource = name
	var rev templates.Revision
	err := c.fetching(body, check, func(ctx context.Context) (err error) {
		rev, err = fetch(ctx, name)
		return err
	})
	if err != nil {
		return err
	}
	return c.answerVersion(rev)
}

// fetching has the server fetch something, in one of the places of uploads: body is read,
// and check finds it good first.
func (c *call) fetching(body any, check func() error, fetch func(ctx context.Context) error) error {
	_ = http.NewResponseController(c.w.ResponseWriter).SetReadDeadline(time.Now().Add(c.s.o.Limits.Request))
	if err := c.decode(body); err != nil {
		return err
	}
	if err := check(); err != nil {
		return err
	}
	if err := c.uploadPlace(); err != nil {
		return err
	}
	defer func() { <-c.s.uploads }()
	c.s.metrics.uploading.Inc()
	defer c.s.metrics.uploading.Dec()
	ctx, cancel := context.WithTimeout(c.r.Context(), c.s.o.Limits.Import)
	defer cancel()
	return fetch(ctx)
}

// ImportRequest is the body of an import.
type ImportRequest struct {
	Image    *string `json:"image"`    // HOST[:PORT]/NAME[:TAG][@DIGEST]
	Platform *string `json:"platform"` // OS/ARCH[/VARIANT]; absent: linux on the server's architecture
	Version  *string `json:"version"`  // name of the version; absent: its number
}

// importVersion makes a version of a container image that the server fetches
// from a registry. It answers when the version is READY.
func importVersion(c *call) error {
	var b ImportRequest
	check := func() error {
		if value(b.Image) == "" {
			return invalid("image", "is required")
		}
		return nil
	}
	return c.fetchVersion(&b, check, func(ctx context.Context, template string) (templates.Revision, error) {
		return c.s.o.Library.Import(ctx, c.workspace, templates.Import{
			Template: template, Version: value(b.Version), Image: *b.Image, Platform: value(b.Platform), Actor: c.principal.actor(),
		})
	})
}

// uploadPlace waits a while for a free place among the concurrent uploads.
func (c *call) uploadPlace() error { return c.place(c.s.uploads, "uploads") }

// place waits a while for a free place among the concurrent requests of a kind.
func (c *call) place(among chan struct{}, kind string) error {
	select {
	case among <- struct{}{}:
		return nil
	default:
	}
	ctx, cancel := context.WithTimeout(c.r.Context(), c.s.o.Limits.UploadWait)
	defer cancel()
	select {
	case among <- struct{}{}:
		return nil
	case <-ctx.Done():
		return &fault{kind: ErrTooMany, message: "all places for " + kind + " are taken", after: 5}
	}
}

// patientBody is the request's body; each read may take Limits.TransferIdle,
// and all of them as long as they need. While the archive is being built nothing
// is read, so the deadline goes with the body's last byte.
func (c *call) patientBody() io.Reader {
	return &patient{body: c.r.Body, idle: c.s.o.Limits.TransferIdle, rc: http.NewResponseController(c.w.ResponseWriter)}
}

type patient struct {
	body io.Reader
	idle time.Duration
	rc   *http.ResponseController
}

func (p *patient) Read(b []byte) (int, error) {
	_ = p.rc.SetReadDeadline(time.Now().Add(p.idle))
	n, err := p.body.Read(b)
	// A deadline left behind would end the request's context while the archive is built.
	_ = p.rc.SetReadDeadline(time.Time{})
	return n, err
}

func (c *call) extendWrite() {
	_ = http.NewResponseController(c.w.ResponseWriter).SetWriteDeadline(time.Now().Add(c.s.o.Limits.TransferIdle))
}

// File is an entry of a directory listing.
type File struct {
	Name    string `json:"name"`                // with U+FFFD for what is not UTF-8
	Bytes   []byte `json:"nameBytes,omitempty"` // the name as it is, where it is not UTF-8
	Type    string `json:"type"`                // file, directory, symlink, device, pipe, socket
	Mode    string `json:"mode"`                // octal permissions with setuid, setgid, sticky: "0755"
	UID     int    `json:"uid"`
	GID     int    `json:"gid"`
	Size    int64  `json:"size"` // bytes
	ModTime string `json:"modTime,omitempty"`
}

// FileList is a directory of a volume.
type FileList struct {
	Path    string `json:"path"`
	Entries []File `json:"entries"`
}

func listFiles(c *call) error {
	name, dir, err := c.filePath("/")
	if err != nil {
		return err
	}
	entries, err := c.s.o.Engine.ListDir(c.r.Context(), c.workspace, name, dir)
	if err != nil {
		return err
	}
	list := FileList{Path: dir, Entries: make([]File, len(entries))}
	for i, e := range entries {
		list.Entries[i] = fileBody(e)
	}
	return c.json(list)
}

// readFile sends a file's bytes. Nothing in them is believed: a browser must
// neither guess their type nor run them.
func readFile(c *call) error {
	name, file, err := c.filePath("")
	if err != nil {
		return err
	}
	w := &download{c: c, name: path.Base(file)}
	if err := c.s.o.Engine.ReadFile(c.r.Context(), c.workspace, name, file, w); err != nil {
		return err
	}
	w.begin() // an empty file
	return nil
}

// filePath gives the volume's name and the path inside it, absolute and clean.
func (c *call) filePath(missing string) (volume, file string, err error) {
	volume, err = c.pathName("volume")
	if err != nil {
		return "", "", err
	}
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return "", "", invalid("query", "is not well-formed")
	}
	file = query.Get("path")
	if file == "" {
		file = missing
	}
	switch {
	case file == "":
		return "", "", invalid("path", "is required")
	case len(file) > 4096:
		return "", "", invalid("path", "must have at most 4096 bytes")
	case !strings.HasPrefix(file, "/"), strings.ContainsRune(file, 0):
		return "", "", invalid("path", "must be absolute: it begins with / at the volume's root")
	case path.Clean(file) != file && path.Clean(file)+"/" != file:
		return "", "", invalid("path", "must be clean: no empty, . or .. parts")
	}
	return volume, path.Clean(file), nil
}

// download starts the answer with the first byte, so that until then an error
// can still be an answer.
type download struct {
	c     *call
	name  string
	begun bool
}

func (d *download) begin() {
	if d.begun {
		return
	}
	d.begun = true
	h := d.c.w.Header()
	h.Set("Content-Type", "application/octet-stream")
	disposition := mime.FormatMediaType("attachment", map[string]string{"filename": d.name})
	if disposition == "" {
		disposition = "attachment"
	}
	h.Set("Content-Disposition", disposition)
	h.Set("Content-Security-Policy", "default-src 'none'; sandbox")
	d.c.w.WriteHeader(http.StatusOK)
}

func (d *download) Write(b []byte) (int, error) {
	d.begin()
	d.c.extendWrite()
	return d.c.w.Write(b)
}

func fileBody(e filesystem.Entry) File {
	var raw []byte
	if !utf8.ValidString(e.Name) {
		raw = []byte(e.Name)
	}
	return File{
		Name: strings.ToValidUTF8(e.Name, "\uFFFD"), Bytes: raw, Type: fileType(e.Mode), Mode: fileMode(e.Mode), UID: e.UID, GID: e.GID,
		Size: e.Size, ModTime: stamp(e.ModTime),
	}
}

func fileType(m fs.FileMode) string {
	switch m.Type() {
	case 0:
		return "file"
	case fs.ModeDir:
		return "directory"
	case fs.ModeSymlink:
		return "symlink"
	case fs.ModeNamedPipe:
		return "pipe"
	case fs.ModeSocket:
		return "socket"
	default:
		return "device"
	}
}

// fileMode is the mode as chmod takes it.
func fileMode(m fs.FileMode) string {
	bits := uint32(m.Perm())
	for _, s := range []struct {
		mode fs.FileMode
		bit  uint32
	}{{fs.ModeSetuid, 0o4000}, {fs.ModeSetgid, 0o2000}, {fs.ModeSticky, 0o1000}} {
		if m&s.mode != 0 {
			bits |= s.bit
		}
	}
	return fmt.Sprintf("%04o", bits)
}
