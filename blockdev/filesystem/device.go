package filesystem

import (
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strings"
	"syscall"

	"holdfast/blockdev"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// rawCRC32C is CRC-32C without the usual inversions, as ext4 keeps it.
func rawCRC32C(seed uint32, p []byte) uint32 { return ^crc32.Update(^seed, castagnoli, p) }

// deviceSize is the size in bytes of an image file or block device.
func deviceSize(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// openExclusive opens an image for patching; a block device that is mounted or
// claimed otherwise is refused by the kernel (EBUSY).
func openExclusive(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|syscall.O_EXCL, 0)
}

// readAt reads exactly n bytes; an image that ends before is damaged.
func readAt(r io.ReaderAt, off int64, n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := r.ReadAt(b, off)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("%w: image ends before byte %d", ErrDamaged, off+int64(n))
	}
	return b, err
}

// readHead reads n bytes at off of the image at path.
func readHead(path string, off int64, n int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAt(f, off, n)
}

// allZero reports that b has no other byte than 0.
func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// syncFile flushes f; a failure is final, since a second flush may claim what
// was lost.
func syncFile(f *os.File) error {
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%w: %w", blockdev.ErrFailed, err)
	}
	return nil
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

// parseUUID reads the usual text form; the nil UUID means "none" to every
// filesystem and is refused.
func parseUUID(s string) (UUID, error) {
	var id UUID
	plain := strings.ReplaceAll(s, "-", "")
	if len(s) != 36 || len(plain) != 32 {
		return id, fmt.Errorf("%q is not a UUID", s)
	}
	if _, err := hex.Decode(id[:], []byte(plain)); err != nil {
		return id, fmt.Errorf("%q is not a UUID", s)
	}
	if id == (UUID{}) {
		return id, errors.New("the nil UUID names no filesystem")
	}
	return id, nil
}

// String is the usual text form.
func (id UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}

// validate refuses what must not become a tool's argument.
func (o MakeOptions) validate() error {
	if o.UUID != "" {
		if _, err := parseUUID(o.UUID); err != nil {
			return err
		}
	}
	if o.Inodes < 0 {
		return fmt.Errorf("%d inodes asked for", o.Inodes)
	}
	if len(o.Label) > 12 {
		return fmt.Errorf("label %q is longer than 12 bytes", o.Label)
	}
	for _, c := range o.Label {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-", c) {
			return fmt.Errorf("label %q has a character outside A-Z, a-z, 0-9, _ . -", o.Label)
		}
	}
	if strings.HasPrefix(o.Label, "-") {
		return fmt.Errorf("label %q begins with a dash", o.Label)
	}
	return nil
}
