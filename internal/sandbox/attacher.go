package sandbox

import (
	"context"

	"holdfast/api"
	"holdfast/blockdev/attach"
)

// NewAttacher gives the attacher for this runtime's own sandboxes: that for runc
// containers, with the runtime's state directory (RuncRoot), under a type of its
// own, so that no request of a client can name one of these containers.
func NewAttacher(runc attach.Attacher) attach.Attacher { return attacher{runc} }

type attacher struct{ attach.Attacher }

// Resolve is that of the containers, which knows its type by another name.
func (a attacher) Resolve(ctx context.Context, t attach.Target, mountPath string) (attach.Target, error) {
	t, err := a.Attacher.Resolve(ctx, t, mountPath)
	t.Type = api.SandboxTarget
	return t, err
}
