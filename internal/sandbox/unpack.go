package sandbox

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"holdfast/internal/sys"
	"holdfast/templates/oci"
)

// source is where an operator says that an image is:
//
//	/DIRECTORY           a root filesystem, used as it is
//	oci:/PATH[#TAG]      an image layout or the output of docker save, a tar or a directory
//	HOST/NAME[:TAG]      an image of a registry that the operator lists as well
//
// The last two are unpacked at their first use in a daemon's life; one digest once.
type source struct {
	text string

	mu   sync.Mutex
	done *image
}

// settings is what is kept of a container image's configuration beside its tree.
type settings struct {
	Env []string `json:"env,omitempty"`
	Dir string   `json:"dir,omitempty"`
}

// get gives the image, made if need be. One maker at a time.
func (s *source) get(ctx context.Context, im *images) (image, error) {
	if path.IsAbs(s.text) {
		return image{dir: s.text, cwd: "/"}, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done != nil {
		return *s.done, nil
	}
	found, err := s.fetch(ctx, im)
	if err != nil {
		return image{}, err
	}
	s.done = &found
	return found, nil
}

// fetch asks for the image. A registry that does not answer is no reason to do
// without what it gave an earlier time.
func (s *source) fetch(ctx context.Context, im *images) (image, error) {
	sum := sha256.Sum256([]byte(s.text))
	latest := filepath.Join(im.dir, "latest-"+hex.EncodeToString(sum[:8]))
	opened, err := s.open(ctx, im)
	if err != nil {
		if dir, e := os.Readlink(latest); e == nil && errors.Is(err, oci.ErrRegistry) {
			im.log.Warn("a registry does not answer: the image that it gave before is used", "image", s.text, "cause", err)
			return im.unpacked(filepath.Join(im.dir, dir))
		}
		return image{}, err
	}
	defer func() { _ = opened.Close() }() // nothing was written
	algorithm, digest, ok := strings.Cut(opened.Digest, ":")
	if !ok || algorithm != "sha256" {
		return image{}, fmt.Errorf("digest %q", opened.Digest)
	}
	dir := filepath.Join(im.dir, "oci-"+digest)
	if _, err := os.Stat(dir); err != nil {
		if err := im.unpack(ctx, opened, dir); err != nil {
			return image{}, err
		}
	}
	if err := replaceLink(filepath.Base(dir), latest); err != nil {
		return image{}, err
	}
	return im.unpacked(dir)
}

func (s *source) open(ctx context.Context, im *images) (*oci.Image, error) {
	o := oci.Options{Staging: im.dir, OmitDevices: true}
	if place, ok := strings.CutPrefix(s.text, "oci:"); ok {
		place, o.Tag, _ = strings.Cut(place, "#")
		return oci.OpenLayoutFile(ctx, place, o)
	}
	if im.registries == nil {
		return nil, fmt.Errorf("%w: none is configured", oci.ErrNotAllowed)
	}
	return im.registries.Open(ctx, s.text, o)
}

func replaceLink(to, at string) error {
	if err := os.Remove(at + ".new"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(os.Symlink(to, at+".new"), os.Rename(at+".new", at))
}

// unpacked reads what is kept of an image.
func (im *images) unpacked(dir string) (image, error) {
	text, err := os.ReadFile(dir + ".json")
	if err != nil {
		return image{}, err
	}
	var s settings
	if err := json.Unmarshal(text, &s); err != nil {
		return image{}, err
	}
	return image{dir: dir, env: s.Env, cwd: s.Dir}, nil
}

// unpack writes an image's tree below dir, and its settings beside it. The tree
// gets its name when all of it is on the disk.
func (im *images) unpack(ctx context.Context, from *oci.Image, dir string) (err error) {
	s := settings{Dir: "/"}
	if path.IsAbs(from.Config.WorkingDir) {
		s.Dir = path.Clean(from.Config.WorkingDir)
	}
	for _, env := range from.Config.Env {
		if name, value, ok := strings.Cut(env, "="); ok && checkVariable("env", name, value) == nil {
			s.Env = append(s.Env, env)
		}
	}
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.WriteFile(dir+".json", text, 0o600); err != nil {
		return err
	}
	draft, err := os.MkdirTemp(im.dir, "draft-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(draft))
		}
	}()
	stream := from.Tar(ctx)
	err = errors.Join(untar(stream, draft), stream.Close())
	if err != nil {
		return err
	}
	f, err := os.Open(draft)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := sys.SyncFilesystem(f); err != nil {
		return err
	}
	return errors.Join(os.Rename(draft, dir), sys.SyncDir(im.dir))
}

// untar writes a tree that package oci made: it has checked every entry. Links
// are not followed out of the directory, whatever they say.
func untar(r io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()                             //nolint:errcheck // a place
	if err := root.Chmod(".", 0o755); err != nil { //nolint:gosec // a root directory
		return err
	}
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = writeEntry(root, h, t)
		}
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
	}
}

func writeEntry(root *os.Root, h *tar.Header, content io.Reader) error {
	name := path.Clean(strings.TrimPrefix(h.Name, "/"))
	mode := h.FileInfo().Mode()
	switch h.Typeflag {
	case tar.TypeDir:
		if err := root.MkdirAll(name, 0o755); err != nil {
			return err
		}
	case tar.TypeReg:
		if err := writeContent(root, name, content); err != nil {
			return err
		}
	case tar.TypeSymlink:
		return errors.Join(root.Symlink(h.Linkname, name), root.Lchown(name, h.Uid, h.Gid))
	case tar.TypeLink:
		return root.Link(path.Clean(strings.TrimPrefix(h.Linkname, "/")), name)
	default:
		return fmt.Errorf("%s: type %q", name, h.Typeflag)
	}
	// The owner first: changing him takes setuid away.
	if err := root.Lchown(name, h.Uid, h.Gid); err != nil {
		return err
	}
	if err := root.Chmod(name, mode.Perm()|mode&(os.ModeSetuid|os.ModeSetgid|os.ModeSticky)); err != nil {
		return err
	}
	return root.Chtimes(name, h.ModTime, h.ModTime)
}

func writeContent(root *os.Root, name string, content io.Reader) (err error) {
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	return errors.Join(err, f.Close())
}
