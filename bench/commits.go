package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"holdfast/blockdev"
	"holdfast/internal/run"
)

// Commits measures the servers of two commits in the same rounds. Both are built in
// worktrees of their own, beside the repository that it runs in. They must be
// commits whose `holdfast bench io --serve` is as it is here.
type Commits struct {
	IO
	A, B string // what git calls them
}

// Run builds both, measures and cleans up.
func (c *Commits) Run(ctx context.Context) (_ Report, err error) {
	sides := []struct{ key, commit, program string }{{key: "A", commit: c.A}, {key: "B", commit: c.B}}
	for i, side := range sides {
		tree := filepath.Join(c.Dir, "tree-"+side.key)
		defer func() { err = errors.Join(err, git(context.WithoutCancel(ctx), "worktree", "remove", "--force", tree)) }()
		if err := git(ctx, "worktree", "add", "--detach", "--force", tree, side.commit); err != nil {
			return Report{}, err
		}
		if sides[i].program, err = c.build(ctx, tree); err != nil {
			return Report{}, fmt.Errorf("%s: %w", side.commit, err)
		}
	}
	c.ways = []ioWay{{"raw", "raw file", again, openRaw}}
	for _, kind := range []struct {
		key, name string
		kind      blockdev.Kind
	}{{"vhost", "vhost-user-blk", blockdev.VhostUser}, {"nbd", "NBD", blockdev.NBD}} {
		for _, side := range sides {
			c.ways = append(c.ways, ioWay{kind.key + side.key, kind.name + " of " + side.commit, again, servedBy(side.program, kind.kind)})
		}
		c.pairs = append(c.pairs, ioPair{ours: kind.key + "B", beside: kind.key + "A"})
	}
	report, err := c.IO.Run(ctx)
	report.Name = fmt.Sprintf("%s beside %s", c.B, c.A)
	for i, row := range report.Rows {
		report.Rows[i].Note = verdictOfRatio(row)
	}
	return report, err
}

func verdictOfRatio(row Row) string {
	switch {
	case row.Samples < 6:
		return verdictNone
	case row.Low > 1:
		return verdictBetter
	case row.High < 1:
		return verdictWorse
	}
	return verdictSame
}

func servedBy(program string, kind blockdev.Kind) func(context.Context, *IO, *ioPath) error {
	return func(_ context.Context, b *IO, p *ioPath) error {
		s, err := startOwn(program, ServeOptions{Image: b.image, Kind: kind})
		switch {
		case err != nil:
			return err
		case kind == blockdev.NBD:
			p.nbd(b, s)
		default:
			p.vhost(s)
		}
		return nil
	}
}

func git(ctx context.Context, args ...string) error {
	_, err := run.Run(ctx, run.Cmd{Args: append([]string{"git"}, args...)})
	return err
}

// build makes the programs of a tree, and gives the path of the CLI.
func (c *Commits) build(ctx context.Context, tree string) (string, error) {
	bin := filepath.Join(tree, "bin")
	env := []string{"CGO_ENABLED=0"}
	for _, name := range []string{"HOME", "GOPATH", "GOCACHE", "GOMODCACHE", "GOFLAGS", "GOPROXY", "GOTOOLCHAIN"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	_, err := run.Run(ctx, run.Cmd{
		Args: []string{"go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", bin + "/", "./cmd/holdfast", "./cmd/holdfast-blockd"},
		Dir:  tree, Env: env, Timeout: 10 * time.Minute,
	})
	return filepath.Join(bin, "holdfast"), err
}
