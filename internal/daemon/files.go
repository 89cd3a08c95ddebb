package daemon

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// writeFile durably and atomically makes a file of mode 0600 with this content.
func writeFile(path string, content []byte) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".tmp-"+filepath.Base(path)+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	if _, err = f.Write(content); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return errors.Join(f.Close(), syncDir(dir))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// secretBytes are 256 bits.
const secretBytes = 32

// secret reads a signing secret, made at the first start. A file of another
// length or that others can read is refused: it is not what was made here.
func secret(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		b = make([]byte, secretBytes)
		if _, err := rand.Read(b); err != nil {
			return nil, err
		}
		return b, writeFile(path, b)
	}
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if len(b) != secretBytes || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s: not a secret of %d bytes that only its owner can read; remove it to have a new one made (cursors and upload URLs given out become invalid)", path, secretBytes)
	}
	return b, nil
}

// makeDirs makes the daemon's own directories, which nobody else may enter.
func makeDirs(dirs ...string) error {
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	return nil
}
