package oci

import (
	"context"
	"errors"
	"io"
	"os"

	files "holdfast/blockdev/tree"
	"holdfast/templates/archive"
)

// Ingest reads an archive as an upload is read, with limits that do not matter,
// and leaves nothing of it but the tree.
func Ingest(ctx context.Context, r io.Reader) (t files.Tree, err error) {
	f, err := os.CreateTemp("", "ingest-")
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	store := files.NewStore(f)
	defer store.Close()
	return archive.Read(ctx, r, archive.Limits{Bytes: 1 << 30, Entries: 1e6}, store)
}
