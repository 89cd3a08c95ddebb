package runc

import "context"

// RecordedPid tells the first process that a container's record leaves no doubt
// about, 0 for a doubt.
func RecordedPid(root, id string) int {
	p := record(root, id).process()
	if p == nil {
		return 0
	}
	defer p.close()
	return p.pid
}

// AskedPid is ask, for tests.
func (a *Attacher) AskedPid(ctx context.Context, root, id string, hint int) (int, error) {
	p, err := a.ask(ctx, root, id, hint)
	if err != nil {
		return 0, err
	}
	defer p.close()
	return p.pid, nil
}
