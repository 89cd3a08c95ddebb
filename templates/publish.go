package templates

import (
	"cmp"
	"context"
	"io"

	"holdfast/blockdev/filesystem"
	"holdfast/templates/remote"
)

// Publication asks for the image that volumes of one kind are cloned from.
type Publication struct {
	Version    string          // name, number or "latest"; empty: latest
	Filesystem filesystem.Type // empty: ext4
	SizeMiB    int64           // of the volumes; 0: the template's default, or as small as its own image is
}

// Publish writes the sized image of a revision to w as package remote sends it; begin
// is called when nothing but w and the context can fail any more. ErrNotFound,
// ErrTooSmall, ErrInvalid, ErrRemote for one that is published already.
func (l *Library) Publish(ctx context.Context, workspace, name string, p Publication, begin func(v Revision) io.Writer) error {
	t, v, err := l.Resolve(ctx, workspace, name+":"+cmp.Or(p.Version, LatestVersion))
	if err != nil {
		return err
	}
	if v.Remote != nil {
		return v.remoteError()
	}
	most := min(l.o.MaxImageBytes, remote.MaxSize)
	s := SourceSpec{Filesystem: cmp.Or(p.Filesystem, filesystem.Ext4), Size: p.SizeMiB * filesystem.MiB, Revision: v.ID}
	if p.SizeMiB == 0 {
		s.Size = max(t.DefaultSizeMiB*filesystem.MiB, roundUp(v.MinimumFor(s.Filesystem), filesystem.MiB))
		if s.Filesystem == filesystem.Ext4 {
			s.Size = max(s.Size, roundUp(v.ImageBytes, filesystem.MiB))
		}
	}
	if p.SizeMiB > most/filesystem.MiB || s.Size > most {
		return invalid("the image of %s:%s is to have %d MB, and at most %d MB can be published", v.Template, v.Name, max(p.SizeMiB, s.Size/filesystem.MiB), most/filesystem.MiB)
	}
	id, release, err := l.Source(ctx, s)
	if err != nil {
		return err
	}
	defer release()
	image, giveBack, err := l.lend(ctx, id)
	if err != nil {
		return l.poolError(err)
	}
	defer giveBack()
	return remote.Send(ctx, begin(v), remote.Head{
		Template: v.Template, Version: v.Name, Filesystem: s.Filesystem, Size: s.Size,
		ContentBytes: v.ContentBytes, Entries: v.Entries, DataBytes: v.DataBytes,
	}, image)
}
