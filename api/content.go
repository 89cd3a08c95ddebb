package api

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"holdfast/templates"
)

// DiffEntry is a name that is not the same in two versions of a template.
type DiffEntry struct {
	Path    string    `json:"path"`                // with U+FFFD for what is not UTF-8
	Bytes   []byte    `json:"pathBytes,omitempty"` // the path as it is, where it is not UTF-8
	Action  string    `json:"action"`              // added, removed, changed
	Changed []string  `json:"changed,omitempty"`   // kind, contents, target, mode, owner, mtime, xattrs, links
	Before  *DiffFile `json:"before,omitempty"`    // not of an added one
	After   *DiffFile `json:"after,omitempty"`     // not of a removed one
}

// DiffFile is what a name was or is.
type DiffFile struct {
	Type    string `json:"type"` // file, directory, symlink
	Mode    string `json:"mode"` // octal: "0755"
	UID     uint32 `json:"uid"`
	GID     uint32 `json:"gid"`
	Size    int64  `json:"size"` // bytes, of a file
	ModTime string `json:"modTime"`
	Target  string `json:"target,omitempty"` // of a symlink, with U+FFFD for what is not UTF-8
}

// DiffEnd ends the answer to a comparison: its last fields.
type DiffEnd struct {
	Added   int64 `json:"added"`
	Removed int64 `json:"removed"`
	Changed int64 `json:"changed"`
}

// diffTime bounds a comparison with its answer.
const diffTime = 10 * time.Minute

// diffTemplate streams one JSON object, entry by entry: a million of them take no
// memory here. An error in the middle cuts the connection, so the object is whole
// or no JSON.
func diffTemplate(c *call) error {
	name, err := c.pathName("volume template")
	if err != nil {
		return err
	}
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return invalid("query", "is not well-formed")
	}
	from, to := query.Get("from"), query.Get("to")
	if from == "" {
		return invalid("from", "is required: the version to compare with")
	}
	d := &diffWriter{c: c, out: bufio.NewWriterSize(patientWriter{c}, 64<<10)}
	// It holds two trees in memory: not for somebody who does not read on.
	ctx, cancel := context.WithTimeout(c.r.Context(), diffTime)
	defer cancel()
	if err := c.s.o.Library.Diff(ctx, c.workspace, name, from, to, d.begin, d.entry); err != nil {
		return err
	}
	return d.end()
}

// patientWriter renews the deadline with each write.
type patientWriter struct{ c *call }

func (w patientWriter) Write(b []byte) (int, error) {
	w.c.extendWrite()
	return w.c.w.Write(b)
}

type diffWriter struct {
	c   *call
	out *bufio.Writer
	n   DiffEnd
	any bool
}

func (d *diffWriter) begin(from, to templates.Revision) {
	d.c.w.Header().Set("Content-Type", "application/json")
	head, err := json.Marshal(struct {
		From string `json:"from"`
		To   string `json:"to"`
	}{from.Name, to.Name})
	if err != nil {
		panic("api: " + err.Error())
	}
	_, _ = d.out.WriteString(strings.TrimSuffix(string(head), "}") + `,"entries":[`) // its error sticks to out
}

func (d *diffWriter) entry(c templates.Difference) error {
	e := DiffEntry{
		Path: strings.ToValidUTF8(c.Path, "\uFFFD"), Action: c.Action, Changed: c.Aspects, Before: diffFile(c.Before), After: diffFile(c.After),
	}
	if !utf8.ValidString(c.Path) {
		e.Bytes = []byte(c.Path)
	}
	switch c.Action {
	case "added":
		d.n.Added++
	case "removed":
		d.n.Removed++
	default:
		d.n.Changed++
	}
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if d.any {
		_ = d.out.WriteByte(',')
	}
	d.any = true
	_ = d.out.WriteByte('\n')
	_, err = d.out.Write(b)
	return err
}

func diffFile(n *templates.Inode) *DiffFile {
	if n == nil {
		return nil
	}
	return &DiffFile{
		Type: n.Kind, Mode: fmt.Sprintf("%04o", n.Mode), UID: n.UID, GID: n.GID, Size: n.Size,
		ModTime: stamp(n.ModTime), Target: strings.ToValidUTF8(n.Target, "\uFFFD"),
	}
}

func (d *diffWriter) end() error {
	b, err := json.Marshal(d.n)
	if err != nil {
		panic("api: " + err.Error())
	}
	_, _ = d.out.WriteString("\n]," + strings.TrimPrefix(string(b), "{") + "\n")
	return d.out.Flush()
}

// versionHeader names the version that an archive is of.
const versionHeader = "X-Holdfast-Version"

// templateArchive sends a version as a plain tar.
func templateArchive(c *call) error {
	name, err := c.pathName("volume template")
	if err != nil {
		return err
	}
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return invalid("query", "is not well-formed")
	}
	return c.s.o.Library.Archive(c.r.Context(), c.workspace, name, query.Get("version"), func(v templates.Revision, length int64) io.Writer {
		h := c.w.Header()
		h.Set("Content-Type", "application/x-tar")
		h.Set("Content-Length", strconv.FormatInt(length, 10))
		h.Set("Content-Disposition", `attachment; filename="`+name+"-"+v.Name+`.tar"`) // both are plain words
		h.Set(versionHeader, v.Name)
		c.w.WriteHeader(http.StatusOK)
		return patientWriter{c}
	})
}

// deltaHeader beside an upload URL says that it also takes what package delta says.
const deltaHeader = "X-Holdfast-Upload-Delta"

// KnownChunks says what the server has of a tree.
type KnownChunks struct {
	Same  bool   `json:"same"`  // a version holds just this tree
	Known []byte `json:"known"` // a bit for each chunk, the first in the lowest bit of the first byte
}

func (c *call) upload() (templates.Upload, error) {
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return templates.Upload{}, invalid("query", "is not well-formed")
	}
	c.resource = c.r.PathValue("id")
	return templates.Upload{ID: c.r.PathValue("id"), Expires: query.Get("expires"), Signature: query.Get("signature"), Format: query.Get("format")}, nil
}

// knownChunks answers what of a tree need not be sent. The signed URL is the
// authority, as with the upload itself; nothing changes.
func knownChunks(c *call) error {
	u, err := c.upload()
	if err != nil {
		return err
	}
	a, err := c.s.o.Library.Known(c.r.Context(), u, c.patientBody())
	if err != nil {
		return err
	}
	c.extendWrite()
	return c.json(KnownChunks{Same: a.Same, Known: append([]byte{}, a.Known...)})
}

// receiveDelta is receiveUpload for a tree with those chunks that the server lacks.
func receiveDelta(c *call) error { return c.receive(c.s.o.Library.IngestDelta) }
