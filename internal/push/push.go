package push

import (
	"context"
	"errors"
	"fmt"
	"io"

	"holdfast/api/client"
	"holdfast/blockdev/tree"
	"holdfast/internal/tarball"
	"holdfast/templates/delta"
)

// Directory gives the parts of a directory as the client asks for them. Errors
// are those of package tarball, and client.ErrWhole for what a tree cannot say.
// It is for one push.
func Directory(p *tarball.Plan) client.Delta { return &directory{plan: p} }

type directory struct {
	plan *tarball.Plan
	tree tree.Tree
}

// Query implements client.Delta. It reads the whole directory.
func (d *directory) Query(ctx context.Context) (b []byte, err error) {
	d.tree, err = d.plan.Tree(ctx, nil)
	if errors.Is(err, tarball.ErrNoTree) || errors.Is(err, tree.ErrNotBelow) {
		return nil, fmt.Errorf("%w: %w", client.ErrWhole, err)
	}
	if err != nil {
		return nil, err
	}
	return delta.NewQuery(d.tree).Encode()
}

// Body implements client.Delta.
func (d *directory) Body(ctx context.Context, same bool, known []byte) (io.ReadCloser, int64, error) {
	chunks := d.plan.Chunks()
	body, err := delta.NewBody(d.tree, known, func(_ context.Context, c delta.Chunk, b []byte) error {
		return chunks.Read(c.Node, c.Index, b)
	})
	if same {
		body, err = delta.NewSame(d.tree.Identity())
	}
	if err != nil {
		return nil, 0, err
	}
	r, w := io.Pipe()
	go func() {
		err := body.Write(ctx, w)
		_ = w.CloseWithError(errors.Join(err, chunks.Close())) // always nil
	}()
	return r, body.Length(), nil
}
