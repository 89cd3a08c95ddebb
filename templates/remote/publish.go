package remote

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"

	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// Files are what Publish has written.
type Files struct {
	Image    string `json:"image"` // paths
	Chunks   string `json:"chunks"`
	Manifest string `json:"manifest"`
	Digest   string `json:"digest"` // "sha256:..." of the manifest
	Size     int64  `json:"size"`   // of the image, bytes
}

var wordForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$`)

// Publish reads a stream of an image and writes its three files into a directory,
// durably, the manifest last. Files of the same names are replaced, unless they are of
// another image (ErrOther). progress, if not nil, is told up to where the image is written.
func Publish(dir string, stream io.Reader, progress func(done, size int64)) (Files, error) {
	r := bufio.NewReaderSize(stream, maxHead)
	h, err := readHead(r)
	if err != nil {
		return Files{}, err
	}
	if !wordForm.MatchString(h.Template) || !wordForm.MatchString(h.Version) { // they become file names
		return Files{}, fmt.Errorf("%w: it is of %.80q", ErrStream, h.Template+":"+h.Version)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // what is in it is to be published
		return Files{}, err
	}
	name := h.Template + "-" + h.Version
	m := Manifest{Head: h, Image: name + ".image", Chunks: name + ".chunks"}
	f := Files{Image: filepath.Join(dir, m.Image), Chunks: filepath.Join(dir, m.Chunks), Manifest: filepath.Join(dir, name+".json"), Size: h.Size}
	if err := sameAsThere(f.Manifest, h); err != nil {
		return Files{}, err
	}
	var chunks overlay.Chunks
	err = place(f.Image, func(to *os.File) error {
		if err := receive(r, h, to, progress); err != nil {
			return err
		}
		if chunks, err = digest(to, h.Size); err != nil {
			return err
		}
		sum := sha256.New()
		if err := overlay.WriteChunks(sum, chunks); err != nil {
			return err
		}
		return sameBytesAsThere(f.Manifest, FormatDigest([sha256.Size]byte(sum.Sum(nil))))
	})
	if err != nil {
		return Files{}, err
	}
	sum := sha256.New()
	if err := place(f.Chunks, func(to *os.File) error { return overlay.WriteChunks(io.MultiWriter(to, sum), chunks) }); err != nil {
		return Files{}, err
	}
	m.ChunksDigest = FormatDigest([sha256.Size]byte(sum.Sum(nil)))
	b := m.Encode()
	f.Digest = FormatDigest(sha256.Sum256(b))
	return f, place(f.Manifest, func(to *os.File) error { _, err := to.Write(b); return err })
}

// ErrOther means that a directory has the same version in another form.
var ErrOther = errors.New("the directory has this version with another filesystem, another size or other bytes")

// sameAsThere makes sure that files which are replaced are of the same image: they may
// be published already.
func sameAsThere(manifest string, h Head) error {
	b, err := os.ReadFile(manifest)
	if err != nil { // as a rule there is none; another error comes again
		return nil
	}
	if m, err := DecodeManifest(b); err == nil && m.Head != h {
		return fmt.Errorf("%w (%s, %d MiB): use another directory", ErrOther, m.Filesystem, m.Size>>20)
	}
	return nil
}

// sameBytesAsThere makes sure that a version which was published is not replaced by one
// with other bytes, as one that was built anew has: volumes may still want the first.
func sameBytesAsThere(manifest, chunksDigest string) error {
	b, err := os.ReadFile(manifest)
	if err != nil {
		return nil
	}
	if m, err := DecodeManifest(b); err == nil && m.ChunksDigest != chunksDigest {
		return fmt.Errorf("%w: use another directory, and another place in the store", ErrOther)
	}
	return nil
}

// chunkFor is the smallest chunk, in bytes, with which the digests of an image stay
// within MaxChunks, and the usual one where that does.
func chunkFor(size int64) int64 {
	chunk := int64(overlay.DefaultChunk)
	for size/chunk*sha256.Size > MaxChunks/2 {
		chunk *= 2
	}
	return min(chunk, 4<<20)
}

func digest(f *os.File, size int64) (overlay.Chunks, error) {
	return overlay.Digest(overlay.NewImage(f, size), chunkFor(size))
}

// place writes a file whole, durably and under its name when it is.
func place(path string, write func(*os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	placed := false
	defer func() {
		if !placed {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync()); err != nil { //nolint:gosec // it is to be published
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	placed = true
	return errors.Join(f.Close(), sys.SyncDir(filepath.Dir(path)))
}
