package api

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"mime"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// SandboxEntry is a file of a sandbox, or a directory with what is in it.
type SandboxEntry struct {
	Dir     bool
	Info    SandboxFile   // of a file
	Entries []SandboxFile // of a directory
	Dirs    []string      // names of the directories in it
}

// SandboxFile is an entry of a directory in a sandbox.
type SandboxFile struct {
	Path         string `json:"path"`
	Name         string `json:"name"`
	Size         int64  `json:"size"`
	Permissions  string `json:"permissions"` // octal: "644"
	Owner        string `json:"owner"`
	Group        string `json:"group"`
	LastModified string `json:"lastModified"`
}

// SandboxContent is a file with its text.
type SandboxContent struct {
	SandboxFile

	Content string `json:"content"`
}

// SandboxDir is a directory of a sandbox.
type SandboxDir struct {
	Path           string        `json:"path"`
	Name           string        `json:"name"`
	Files          []SandboxFile `json:"files"`
	Subdirectories []SandboxSub  `json:"subdirectories"`
}

// SandboxSub is a directory in a directory.
type SandboxSub struct {
	Path string `json:"path"`
	Name string `json:"name"`
}

// FileRequest is the body of PUT filesystem.
type FileRequest struct {
	Content     *string `json:"content"`
	IsDirectory *bool   `json:"isDirectory"`
	Permissions *string `json:"permissions"` // octal
}

// TreeRequest is the body of PUT filesystem/tree: texts by path below it.
type TreeRequest struct {
	Files map[string]string `json:"files"`
}

const (
	// largestText bounds a file that is answered inside JSON, in bytes.
	largestText = 16 << 20
	// smallText are read without waiting for one of the few places for larger ones.
	smallText    = 256 << 10
	textsAtATime = 8
)

// sandboxPath is the path in the path: one segment that holds all of it, with or
// without its leading slash.
func (c *call) sandboxPath() (string, error) {
	p := path.Clean("/" + c.r.PathValue("path"))
	if len(p) > 4095 || strings.ContainsRune(p, 0) {
		return "", invalid("path", "must have at most 4095 bytes and no NUL")
	}
	return p, nil
}

// pathFile is the sandbox and the file that the path names.
func (c *call) pathFile() (r Sandboxes, name, file string, err error) {
	if r, name, err = c.pathSandbox(); err != nil {
		return nil, "", "", err
	}
	file, err = c.sandboxPath()
	return r, name, file, err
}

func getSandboxFile(c *call) error {
	r, name, file, err := c.pathFile()
	if err != nil {
		return err
	}
	if strings.Contains(c.r.Header.Get("Accept"), "application/octet-stream") {
		w := &download{c: c, name: path.Base(file)}
		if err := r.ReadFile(c.r.Context(), c.workspace, name, file, w); err != nil {
			return err
		}
		w.begin() // an empty file
		return nil
	}
	e, err := r.Look(c.r.Context(), c.workspace, name, file)
	if err != nil {
		return err
	}
	c.extendWrite()
	if e.Dir {
		return c.json(dirBody(file, e))
	}
	if e.Info.Size > largestText {
		return refuse(ErrSandboxFile, "%s has %d bytes: ask for it with Accept: application/octet-stream", file, e.Info.Size)
	}
	if e.Info.Size > smallText {
		select {
		case c.s.texts <- struct{}{}:
			defer func() { <-c.s.texts }()
		case <-c.r.Context().Done():
			return c.r.Context().Err()
		}
	}
	text := &bounded{room: largestText}
	if err := r.ReadFile(c.r.Context(), c.workspace, name, file, text); err != nil {
		return err
	}
	c.extendWrite()
	return c.json(SandboxContent{SandboxFile: e.Info, Content: strings.ToValidUTF8(text.String(), "\uFFFD")})
}

func dirBody(dir string, e SandboxEntry) SandboxDir {
	b := SandboxDir{Path: dir, Name: path.Base(dir), Files: e.Entries, Subdirectories: []SandboxSub{}}
	if b.Files == nil {
		b.Files = []SandboxFile{}
	}
	for _, sub := range e.Dirs {
		b.Subdirectories = append(b.Subdirectories, SandboxSub{Path: path.Join(dir, sub), Name: sub})
	}
	return b
}

// bounded is a buffer that refuses more than its room: a file may grow while it is read.
type bounded struct {
	bytes.Buffer
	room int
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > b.room {
		return 0, errors.New("the file grew while it was read")
	}
	return b.Buffer.Write(p)
}

var permissionsForm = regexp.MustCompile(`^0?[0-7]{3,4}$`)

func checkPermissions(s string) error {
	if s != "" && !permissionsForm.MatchString(s) {
		return invalid("permissions", "must be octal, like 0644")
	}
	return nil
}

// putSandboxFile writes a file or makes a directory: JSON, or a form whose part
// "file" is the content.
func putSandboxFile(c *call) error {
	r, name, file, err := c.pathFile()
	if err != nil {
		return err
	}
	c.resource = name
	if err := c.uploadPlace(); err != nil {
		return err
	}
	defer func() { <-c.s.uploads }()
	if kind, _, _ := mime.ParseMediaType(c.r.Header.Get("Content-Type")); kind == "multipart/form-data" {
		return c.putForm(r, name, file)
	}
	var b FileRequest
	if err := c.decodeSlowly(&b, largestContent); err != nil {
		return err
	}
	permissions := value(b.Permissions)
	if err := checkPermissions(permissions); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.r.Context(), c.s.o.Limits.Request)
	defer cancel()
	if b.IsDirectory != nil && *b.IsDirectory {
		err = r.MakeDir(ctx, c.workspace, name, file, permissions)
	} else {
		err = r.WriteFile(ctx, c.workspace, name, file, permissions, strings.NewReader(value(b.Content)))
	}
	if err != nil {
		return err
	}
	c.extendWrite()
	return c.json(Done{Message: "written", Path: file})
}

// putForm takes the parts in the order in which they come: what says something of
// the file must come before it, or is not heard.
func (c *call) putForm(r Sandboxes, name, file string) error {
	permissions := ""
	err := c.formFile(func(field string, part io.Reader) error {
		if field != "permissions" {
			return nil
		}
		b, err := io.ReadAll(io.LimitReader(part, 16))
		permissions = string(b)
		return err
	}, func(part io.Reader) error {
		if err := checkPermissions(permissions); err != nil {
			return err
		}
		return r.WriteFile(c.r.Context(), c.workspace, name, file, permissions, part)
	})
	if err != nil {
		return err
	}
	c.extendWrite()
	return c.json(Done{Message: "written", Path: file})
}

// formFile reads a form and gives its part "file" to write.
func (c *call) formFile(other func(field string, part io.Reader) error, write func(part io.Reader) error) error {
	c.r.Body = io.NopCloser(c.patientBody())
	form, err := c.r.MultipartReader()
	if err != nil {
		return invalid("body", "must be a form (multipart/form-data)")
	}
	written := false
	for {
		part, err := form.NextPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return invalid("body", "is not a well-formed form, or broke off before its end")
		}
		if part.FormName() != "file" {
			err = other(part.FormName(), part)
		} else if written {
			err = invalid("body", "has two parts called file")
		} else {
			written, err = true, write(part)
		}
		if err != nil {
			return err
		}
	}
	if !written {
		return invalid("body", "has no part called file")
	}
	return nil
}

func deleteSandboxFile(c *call) error {
	r, name, file, err := c.pathFile()
	if err != nil {
		return err
	}
	c.resource = name
	recursive, err := flag(c.r.URL.Query(), "recursive")
	if err != nil {
		return err
	}
	if file == "/" {
		return invalid("path", "/ cannot be removed")
	}
	if err := r.RemoveFile(c.r.Context(), c.workspace, name, file, recursive); err != nil {
		return err
	}
	return c.json(Done{Message: "removed", Path: file})
}

// putSandboxTree writes several files below a directory.
func putSandboxTree(c *call) error {
	r, name, dir, err := c.pathFile()
	if err != nil {
		return err
	}
	c.resource = name
	if err := c.uploadPlace(); err != nil {
		return err
	}
	defer func() { <-c.s.uploads }()
	var b TreeRequest
	if err := c.decodeSlowly(&b, largestContent); err != nil {
		return err
	}
	if len(b.Files) > 1000 {
		return invalid("files", "must be at most 1000")
	}
	for relative, content := range b.Files {
		file := path.Join(dir, path.Clean("/"+relative))
		if err := r.WriteFile(c.r.Context(), c.workspace, name, file, "", strings.NewReader(content)); err != nil {
			return err
		}
	}
	if len(b.Files) == 0 {
		if err := r.MakeDir(c.r.Context(), c.workspace, name, dir, ""); err != nil {
			return err
		}
	}
	e, err := r.Look(c.r.Context(), c.workspace, name, dir)
	if err != nil {
		return err
	}
	c.extendWrite()
	return c.json(dirBody(dir, e))
}

// Uploads in parts: each part is a file in the sandbox until all are joined.

// UploadStarted is the answer to the beginning of an upload in parts.
type UploadStarted struct {
	UploadID string `json:"uploadId"`
	Path     string `json:"path"`
}

// UploadedPart is one part that is there.
type UploadedPart struct {
	PartNumber int    `json:"partNumber"`
	ETag       string `json:"etag"`
	Size       int64  `json:"size"`
}

// UploadParts is the body that ends an upload.
type UploadParts struct {
	Parts []struct {
		PartNumber int    `json:"partNumber"`
		ETag       string `json:"etag"`
	} `json:"parts"`
}

// uploadForm is an upload's id: random, and where its parts are. Nothing is
// remembered of it here, and the sandbox can only harm itself through it.
var uploadForm = regexp.MustCompile(`^[0-9a-f]{32}$`)

func newUploadID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

const maxParts = 10000

func uploadDir(id string) string { return "/tmp/.upload-" + id }

func partFile(id string, n int) string { return fmt.Sprintf("%s/%d", uploadDir(id), n) }

func beginParts(c *call) error {
	r, name, file, err := c.pathFile()
	if err != nil {
		return err
	}
	c.resource = name
	var b FileRequest
	if err := c.decodeSlowly(&b, c.s.o.Limits.Body); err != nil {
		return err
	}
	permissions := value(b.Permissions)
	if err := checkPermissions(permissions); err != nil {
		return err
	}
	id := newUploadID()
	ctx, ws := c.r.Context(), c.workspace
	if err := r.MakeDir(ctx, ws, name, uploadDir(id), "0700"); err != nil {
		return err
	}
	if err := r.WriteFile(ctx, ws, name, uploadDir(id)+"/target", "", strings.NewReader(permissions+"\n"+file)); err != nil {
		return err
	}
	return c.json(UploadStarted{UploadID: id, Path: file})
}

// pathUpload is the upload that the path names, and its target.
func (c *call) pathUpload() (r Sandboxes, name, id, file, permissions string, err error) {
	if r, name, err = c.pathSandbox(); err != nil {
		return nil, "", "", "", "", err
	}
	c.resource = name
	id = c.r.PathValue("upload")
	if !uploadForm.MatchString(id) {
		return nil, "", "", "", "", refuse(ErrMissing, "upload %q not found", clip(id, 64))
	}
	text := &bounded{room: 5000}
	if err := r.ReadFile(c.r.Context(), c.workspace, name, uploadDir(id)+"/target", text); err != nil {
		return nil, "", "", "", "", err
	}
	permissions, file, _ = strings.Cut(text.String(), "\n")
	if !path.IsAbs(file) || !utf8.ValidString(file) || checkPermissions(permissions) != nil {
		return nil, "", "", "", "", refuse(ErrMissing, "upload %q not found", id)
	}
	return r, name, id, file, permissions, nil
}

func putPart(c *call) error {
	if err := c.uploadPlace(); err != nil {
		return err
	}
	defer func() { <-c.s.uploads }()
	r, name, id, _, _, err := c.pathUpload()
	if err != nil {
		return err
	}
	n, err := partNumber(c.r.URL.Query().Get("partNumber"))
	if err != nil {
		return err
	}
	count := &counter{}
	err = c.formFile(func(string, io.Reader) error { return nil }, func(part io.Reader) error {
		return r.WriteFile(c.r.Context(), c.workspace, name, partFile(id, n), "", io.TeeReader(part, count))
	})
	if err != nil {
		return err
	}
	c.extendWrite()
	return c.json(UploadedPart{PartNumber: n, ETag: fmt.Sprintf("%d-%d", n, count.n), Size: count.n})
}

type counter struct{ n int64 }

func (c *counter) Write(b []byte) (int, error) {
	c.n += int64(len(b))
	return len(b), nil
}

func partNumber(text string) (int, error) {
	var n int
	if _, err := fmt.Sscanf(text, "%d", &n); err != nil || n < 1 || n > maxParts {
		return 0, invalid("partNumber", "must be from 1 to %d", maxParts)
	}
	return n, nil
}

func joinParts(c *call) error {
	r, name, id, file, permissions, err := c.pathUpload()
	if err != nil {
		return err
	}
	var b UploadParts
	if err := c.decodeSlowly(&b, c.s.o.Limits.Body); err != nil {
		return err
	}
	if len(b.Parts) == 0 || len(b.Parts) > maxParts {
		return invalid("parts", "must be 1 to %d", maxParts)
	}
	numbers := make([]int, len(b.Parts))
	for i, p := range b.Parts {
		numbers[i] = p.PartNumber
	}
	slices.Sort(numbers)
	if numbers[0] < 1 || len(slices.Compact(slices.Clone(numbers))) != len(numbers) {
		return invalid("parts", "must have different numbers, from 1 on")
	}
	files := make([]string, len(numbers))
	for i, n := range numbers {
		files[i] = partFile(id, n)
	}
	ctx := c.r.Context()
	if err := r.JoinFiles(ctx, c.workspace, name, file, permissions, files); err != nil {
		return err
	}
	if err := r.RemoveFile(ctx, c.workspace, name, uploadDir(id), true); err != nil {
		return err
	}
	c.extendWrite()
	return c.json(Done{Message: "written", Path: file})
}

func abortParts(c *call) error {
	r, name, id, _, _, err := c.pathUpload()
	if err != nil {
		return err
	}
	if err := r.RemoveFile(c.r.Context(), c.workspace, name, uploadDir(id), true); err != nil {
		return err
	}
	return c.json(Done{Message: "aborted"})
}
