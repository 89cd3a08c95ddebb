package templates

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
)

// How much of an image is read before others may open it in between, in bytes.
const (
	gentleSlice = 8 << 20
	promptSlice = 64 << 20
)

// Verify reads the image of a revision, by name, number or "latest", and compares
// it with the digest that it was published with. It gives the revision as it is
// then: a damaged one is FAILED, and one that was found damaged before and is as
// published now is READY again. Other errors say that it could not be told.
// ErrNotFound for a revision without image.
func (l *Library) Verify(ctx context.Context, workspace, name, version string) (Revision, error) {
	r := l.lookup(keyOf(workspace, name))
	if r == nil {
		return Revision{}, notFound(name)
	}
	v := r.find(version)
	if v == nil && (version == "" || version == LatestVersion) {
		v = r.Template.newestOf(Revision.hadImage)
	}
	if v == nil {
		return Revision{}, fmt.Errorf("%w: version %.70q of %q", ErrNotFound, version, name)
	}
	if !r.hasImage(v.ID) {
		return Revision{}, fmt.Errorf("%w: version %s of %q is %s and has no image", ErrNotFound, v.Name, name, v.Status)
	}
	select {
	case l.verifying <- struct{}{}:
		defer func() { <-l.verifying }()
	case <-ctx.Done():
		return Revision{}, ctx.Err()
	}
	return l.verify(ctx, v.ID, 0)
}

// verify holds a revision's image against its digest, reading at most rate bytes
// a second (0: as fast as it goes), and records what it finds.
func (l *Library) verify(ctx context.Context, id blockdev.ID, rate int64) (Revision, error) {
	v, err := l.pinAny(id)
	if err != nil {
		return Revision{}, err
	}
	defer l.unpin(id)
	if v.Remote != nil {
		why, err := l.examineRemote(ctx, v)
		if err != nil {
			return Revision{}, err
		}
		return l.found(ctx, id, v.ImageDigest, why)
	}
	digest, err := l.digestImage(ctx, id, v.ImageBytes, rate)
	switch why := damageOf(err); {
	case why != "":
		return l.found(ctx, id, "", why)
	case err != nil:
		return Revision{}, err
	case v.ImageDigest != "" && digest != v.ImageDigest:
		return l.found(ctx, id, "", "its image is not what was published")
	default:
		return l.found(ctx, id, digest, "")
	}
}

// damageOf tells damage from errors that say nothing of the image; "" for those.
func damageOf(err error) string {
	switch {
	case errors.Is(err, syscall.EIO), errors.Is(err, syscall.EUCLEAN): // also EFSCORRUPTED
		return "its image cannot be read"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "its image is shorter than it was"
	case errors.Is(err, blockdev.ErrNotFound):
		return "its image is missing"
	}
	return ""
}

// digestImage digests an image in parts, so that nobody waits long for it.
func (l *Library) digestImage(ctx context.Context, id blockdev.ID, size, rate int64) (string, error) {
	d := extent.NewDigester(size)
	slice := int64(promptSlice)
	if rate > 0 {
		slice = min(gentleSlice, rate)
	}
	for {
		read, done, err := l.digestSlice(ctx, id, d, slice)
		l.scrubbedBytes.Add(read)
		if err != nil || done {
			return d.Sum(), err
		}
		if rate > 0 {
			if err := sleep(ctx, time.Duration(float64(read)/float64(rate)*float64(time.Second))); err != nil {
				return "", err
			}
		}
	}
}

func (l *Library) digestSlice(ctx context.Context, id blockdev.ID, d *extent.Digester, most int64) (read int64, done bool, err error) {
	defer l.openings.lock(string(id)).Unlock()
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block}, ReadOnly: true}
	err = l.withEndpoint(ctx, id, want, func(path string) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		read, done, err = d.Next(ctx, f, most)
		return errors.Join(err, f.Close())
	})
	return read, done && err == nil, err
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// found records the outcome of a verification: damaged when why says so. What
// changes the revision's state goes into its description first, so that it is
// known without any record.
func (l *Library) found(ctx context.Context, id blockdev.ID, digest, why string) (Revision, error) {
	ctx = context.WithoutCancel(ctx)
	l.mu.RLock()
	key := l.revisions[id]
	l.mu.RUnlock()
	lock := l.locks.lock(key)
	defer lock.Unlock()
	r := l.lookup(key)
	if r == nil || r.revision(id) == nil {
		return Revision{}, fmt.Errorf("%w: the version was deleted", ErrNotFound)
	}
	was := *r.revision(id)
	v := was
	v.VerifiedAt = l.now()
	v.Damaged = why != ""
	if v.ImageDigest == "" { // of a revision from before there were digests
		v.ImageDigest = digest
	}
	var events []Event
	switch {
	case v.Damaged && was.Status == Ready:
		v.Status, v.Failure = Failed, "damaged: "+why
		events = append(events, Event{Time: v.VerifiedAt, Type: Damaged, Version: v.Name, Message: why})
	case !v.Damaged && was.Damaged:
		v.Status, v.Failure = Ready, ""
		events = append(events, Event{Time: v.VerifiedAt, Type: Restored, Version: v.Name, Message: "its image is as it was published"})
	}
	if why != "" {
		l.sources.forget(id)
	}
	return v, l.recordFound(ctx, key, v, was, events)
}

func (l *Library) recordFound(ctx context.Context, key string, v, was Revision, events []Event) error {
	r := l.lookup(key)
	if v.Status != was.Status || v.ImageDigest != was.ImageDigest {
		err := l.o.Pool.Describe(ctx, v.ID, describe(r, v).encode())
		if err != nil && !(v.Damaged && errors.Is(err, blockdev.ErrNotFound)) {
			return l.poolError(err)
		}
	}
	next, err := l.changeLocked(ctx, key, func(r *record) (*record, error) {
		*r.revision(v.ID) = v
		for _, e := range events {
			r.happened(e)
		}
		return r, nil
	})
	if err != nil {
		return err
	}
	l.mu.Lock()
	delete(l.suspect, v.ID)
	l.mu.Unlock()
	for _, e := range events {
		l.tell(next, e)
	}
	return nil
}

// pinGood is pin for those who are about to use the bytes: after an unclean stop
// the image is verified first, once.
func (l *Library) pinGood(ctx context.Context, id blockdev.ID) (Revision, error) {
	v, err := l.pin(id)
	if err != nil {
		return v, err
	}
	if err := l.clear(ctx, v); err != nil {
		l.unpin(id)
		return Revision{}, err
	}
	return v, nil
}

// clear verifies a revision that is under suspicion; others wait meanwhile.
func (l *Library) clear(ctx context.Context, v Revision) error {
	if !l.isSuspect(v.ID) {
		return nil
	}
	defer l.clearing.lock(string(v.ID)).Unlock()
	if !l.isSuspect(v.ID) {
		return l.damaged(v.ID)
	}
	l.o.Log.Info("a template image is verified before its first use after an unclean stop", "template", v.Template, "version", v.Name, "image", v.ID)
	if _, err := l.verify(ctx, v.ID, 0); err != nil {
		return err
	}
	return l.damaged(v.ID)
}

func (l *Library) isSuspect(id blockdev.ID) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.suspect[id]
}

// damaged is ErrDamaged for a revision that is known to be.
func (l *Library) damaged(id blockdev.ID) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if r := l.records[l.revisions[id]]; r != nil && r.revision(id).Damaged {
		return r.revision(id).damagedError()
	}
	return nil
}

func (v Revision) damagedError() error {
	return fmt.Errorf("%w: version %s of %q: use another version, roll back to one, or push it again", ErrDamaged, v.Name, v.Template)
}

// hadImage tells whether there was an image once: READY, or damaged since.
func (v Revision) hadImage() bool { return v.Status == Ready || v.Damaged }

func (t Template) newestOf(is func(Revision) bool) *Revision {
	for i := len(t.Revisions) - 1; i >= 0; i-- {
		if is(t.Revisions[i]) {
			return &t.Revisions[i]
		}
	}
	return nil
}

// DamagedNames names the damaged revisions as "workspace/name:version", at most
// most of them.
func (l *Library) DamagedNames(most int) string {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var names []string
	for key, r := range l.records {
		for _, v := range r.Template.Revisions {
			if v.Damaged {
				names = append(names, key+":"+v.Name)
			}
		}
	}
	slices.Sort(names)
	if len(names) > most {
		names = append(names[:most], fmt.Sprintf("and %d more", len(names)-most))
	}
	return strings.Join(names, ", ")
}
