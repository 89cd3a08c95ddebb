package bench

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	"holdfast/api/client"
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

// push uploads a tree as a template. Regular files and directories only: the
// tree is our own.
func push(ctx context.Context, c *client.Client, name, dir string) error {
	length := &counter{}
	if err := pack(length, dir); err != nil {
		return err
	}
	reader, writer := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := pack(writer, dir)
		packed <- errors.Join(err, writer.CloseWithError(err))
	}()
	_, err := c.PushTemplate(ctx, client.Push{Name: name, Archive: reader, Length: length.n})
	return errors.Join(err, reader.Close(), <-packed)
}

func pack(w io.Writer, dir string) error {
	archive := tar.NewWriter(w)
	if err := archive.AddFS(os.DirFS(dir)); err != nil {
		return err
	}
	return archive.Close()
}

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) { c.n += int64(len(p)); return len(p), nil }
