package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"holdfast/api/client"
	"holdfast/internal/tarball"
)

// makeTree writes a tree of about mib MiB in files files of very different
// sizes, the same bytes every time: incompressible, so that nothing is saved
// by accident.
func makeTree(dir string, mib int64, files int) error {
	random := rand.New(rand.NewPCG(1, uint64(mib)))
	chunk := make([]byte, 1<<20)
	for i := range chunk {
		chunk[i] = byte(random.Uint32())
	}
	left := mib << 20
	for i := range files {
		size := left / int64(files-i)
		if i%2 == 0 {
			size /= 2
		} else {
			size = min(size*3/2, left)
		}
		left -= size
		path := filepath.Join(dir, fmt.Sprintf("d%02d", i%97), fmt.Sprintf("f%05d", i))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := writeFile(path, chunk, size, random); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(path string, chunk []byte, size int64, random *rand.Rand) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for size > 0 {
		from := random.IntN(len(chunk) / 2)
		n := min(size, int64(len(chunk)-from))
		if _, err := f.Write(chunk[from : from+int(n)]); err != nil {
			return err
		}
		size -= n
	}
	return nil
}

// push uploads a tree as a template.
func push(ctx context.Context, c *client.Client, name, dir string) error {
	plan, err := tarball.New(ctx, dir)
	if err != nil {
		return err
	}
	archive := plan.Reader()
	_, err = c.PushTemplate(ctx, client.Push{Name: name, Archive: archive, Length: plan.Length()})
	return errors.Join(err, archive.Close())
}
