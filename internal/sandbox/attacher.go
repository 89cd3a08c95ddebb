package sandbox

import (
	"context"
	"errors"

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

// AwaitEnd implements attach.Sentry as the attacher of containers does.
func (a attacher) AwaitEnd(ctx context.Context, t attach.Target) error {
	sentry, ok := a.Attacher.(attach.Sentry)
	if !ok {
		return errors.ErrUnsupported
	}
	return sentry.AwaitEnd(ctx, t)
}
