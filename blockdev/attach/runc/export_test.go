package runc

import "context"

// HintedPid is hintedPid, for tests.
var HintedPid = hintedPid

// FindPid is find, for tests.
func (a *Attacher) FindPid(ctx context.Context, root, id string, hint int) (int, error) {
	p, err := a.find(ctx, root, id, hint)
	if err != nil {
		return 0, err
	}
	defer p.close()
	return p.pid, nil
}
