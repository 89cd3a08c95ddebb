package lvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/envelope"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/sys"
)

// The names on the volume for descriptions.
const (
	poolFile      = "pool.json"
	lockFile      = "lock"
	describedDir  = "images"
	draftsDir     = "drafts"
	quarantineDir = "quarantine"
)

// meta is the volume for descriptions, mounted where nobody else sees it: the
// mount is in no namespace's tree and ends with the process.
type meta struct {
	root  *os.Root
	lock  *os.File
	held  []*os.File // the mount
	fault fault
}

// openMeta finds or makes the volume, mounts it and takes the pool's lock.
func (p *Pool) openMeta(ctx context.Context, rows []row, o Options) (_ *meta, err error) {
	uuid, err := p.findMeta(rows)
	if err == nil && uuid == "" {
		uuid, err = p.makeMeta(ctx, rows, o)
	}
	if err != nil {
		return nil, err
	}
	if active, err := p.active(p.metaName()); err != nil {
		return nil, err
	} else if !active {
		if err := p.tell(ctx, "activate descriptions", "lvchange", "-ay", "-K", p.lv(p.metaName())); err != nil {
			return nil, err
		}
	}
	if err := p.sound(); err != nil {
		return nil, err
	}
	m, err := mountMeta(p.node(p.metaName()), p.fault)
	if err != nil {
		return nil, fmt.Errorf("the volume of descriptions: %w", err)
	}
	if p.identity, err = m.loadIdentity(o.Host, uuid); err == nil && p.identity.UUID != uuid {
		err = fmt.Errorf("%w: the volume of descriptions is of pool %s, its tag says %s", blockdev.ErrCorrupt, p.identity.UUID, uuid)
	}
	if err != nil {
		return nil, errors.Join(err, m.close())
	}
	return m, nil
}

// findMeta tells the UUID in the tags of the volume, "" when there is none.
func (p *Pool) findMeta(rows []row) (uuid string, err error) {
	for _, r := range rows {
		if r.Name != p.metaName() {
			continue
		}
		for _, tag := range r.tags() {
			if u, ok := strings.CutPrefix(tag, poolTag); ok && r.Pool == p.thin {
				return u, nil
			}
		}
		return "", fmt.Errorf("%w: volume group %s has a %s that is not of this pool", blockdev.ErrInvalid, p.group, p.metaName())
	}
	return "", nil
}

// makeMeta makes the volume. It gets its name last: a volume of that name is
// complete.
func (p *Pool) makeMeta(ctx context.Context, rows []row, o Options) (uuid string, err error) {
	uuid = newUUID()
	fresh := p.metaName() + ".new"
	for _, r := range rows {
		if r.Name == fresh && slices.Contains(r.tags(), markTag) {
			if err := p.change(ctx, "remove new descriptions", outcome{}, "lvremove", "-f", p.lv(fresh)); err != nil {
				return "", err
			}
		}
	}
	size := p.roundUp(o.MetaBytes)
	if err := p.change(ctx, "create descriptions", outcome{}, "lvcreate", "-Wn", "-V", fmt.Sprintf("%db", size), "-T", p.lv(p.thin), "-n", fresh, "--addtag", markTag, "--addtag", poolTag+uuid); err != nil {
		return "", err
	}
	if err := p.fault.effect("fill descriptions", func() error { return fillMeta(ctx, p.node(fresh), size) }); err != nil {
		return "", p.explain(noSpace(err))
	}
	if err := p.tell(ctx, "deactivate descriptions", "lvchange", "-an", p.lv(fresh)); err != nil {
		return "", err
	}
	return uuid, p.change(ctx, "publish descriptions", outcome{}, "lvrename", p.group, fresh, p.metaName())
}

// fillMeta writes the whole volume, so that it never needs a block of the pool
// again, and makes its filesystem.
func fillMeta(ctx context.Context, node string, size int64) (err error) {
	f, err := os.OpenFile(node, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	zeroes := make([]byte, 1<<20)
	for at := int64(0); at < size && err == nil; at += int64(len(zeroes)) {
		if err = ctx.Err(); err == nil {
			_, err = f.WriteAt(zeroes[:min(int64(len(zeroes)), size-at)], at)
		}
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	x := filesystem.NewTools()
	// A description takes a block of 4 KiB; the rest is for inodes and the journal.
	if err := x.Make(ctx, node, filesystem.Ext4, filesystem.MakeOptions{Inodes: size / (5 << 10), Label: "hf-meta"}); err != nil {
		return err
	}
	return syncDevice(node)
}

func mountMeta(node string, fault fault) (_ *meta, err error) {
	m := &meta{fault: fault}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
		}
	}()
	attr := sys.MountAttr{NoSuid: true, NoDev: true}
	mount, err := sys.NewMount(sys.Filesystem{Device: node, Type: "ext4", Options: []string{"nodiscard"}}, attr)
	if err != nil {
		return m, err
	}
	m.held = append(m.held, mount)
	top, err := sys.OpenMount(mount)
	if err != nil {
		return m, err
	}
	m.held = append(m.held, top)
	if m.root, err = os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", top.Fd())); err != nil {
		return m, err
	}
	for _, dir := range []string{describedDir, draftsDir, quarantineDir} {
		if err := m.root.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return m, err
		}
	}
	if m.lock, err = m.root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return m, err
	}
	if err := sys.LockFile(m.lock); err != nil {
		if errors.Is(err, sys.ErrLocked) {
			err = fmt.Errorf("%w: another process uses the pool (%w)", blockdev.ErrBusy, err)
		}
		return m, err
	}
	return m, m.syncDir(".")
}

func (m *meta) close() error {
	var err error
	if m.lock != nil {
		_ = sys.UnlockFile(m.lock)
		err = m.lock.Close()
	}
	if m.root != nil {
		err = errors.Join(err, m.root.Close())
	}
	for _, f := range m.held {
		err = errors.Join(err, f.Close())
	}
	return err
}

// read gives the payload of an envelope.
func (m *meta) read(name, of string) ([]byte, error) {
	f, err := m.root.Open(name)
	if err != nil {
		return nil, err
	}
	sealed, err := io.ReadAll(io.LimitReader(f, envelope.MaxSealed))
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return envelope.Unseal(of, sealed)
}

// replace durably and atomically makes a file an envelope.
func (m *meta) replace(name, of string, payload []byte) error {
	sealed, err := envelope.Seal(of, payload)
	if err != nil {
		return err
	}
	if err := m.write(name+".new", sealed); err != nil {
		return err
	}
	if err := m.fault.effect("rename a description", func() error { return m.root.Rename(name+".new", name) }); err != nil {
		return noSpace(err)
	}
	dir, _, found := strings.Cut(name, "/")
	if !found {
		dir = "."
	}
	return m.syncDir(dir)
}

// write makes a file and flushes it.
func (m *meta) write(name string, content []byte) error {
	return m.fault.effect("write a description", func() error { return noSpace(m.writeFile(name, content)) })
}

func (m *meta) writeFile(name string, content []byte) error {
	f, err := m.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(content); err == nil {
		if err = f.Sync(); err != nil {
			err = fmt.Errorf("%w: %w", blockdev.ErrFailed, err)
		}
	}
	return errors.Join(err, f.Close())
}

func (m *meta) syncDir(name string) error {
	return m.fault.effect("flush descriptions", func() error {
		d, err := m.root.Open(name)
		if err != nil {
			return err
		}
		if err := d.Sync(); err != nil {
			return errors.Join(fmt.Errorf("%w: %w", blockdev.ErrFailed, err), d.Close())
		}
		return d.Close()
	})
}

func describedName(id blockdev.ID) string { return describedDir + "/" + string(id) }

func (m *meta) describe(id blockdev.ID, description []byte) error {
	return m.replace(describedName(id), string(id), description)
}

// A draft is an image whose name stands among the drafts. It does before there is
// a volume, and until its description takes the name's place.
func draftName(id blockdev.ID) string { return draftsDir + "/" + string(id) }

func (m *meta) isDraft(id blockdev.ID) (bool, error) { return m.there(draftName(id)) }

func (m *meta) beginDraft(id blockdev.ID) error {
	err := m.fault.effect("begin a draft", func() error {
		f, err := m.root.OpenFile(draftName(id), os.O_WRONLY|os.O_CREATE, 0o600)
		if err != nil {
			return noSpace(err)
		}
		return f.Close()
	})
	if err != nil {
		return err
	}
	return m.syncDir(draftsDir)
}

// publish makes a draft an image with a description. The journal of the filesystem
// has both directories in one step; one too small for a journal may show the image
// in both: it is a draft then, with a description.
func (m *meta) publish(id blockdev.ID, description []byte) error {
	sealed, err := envelope.Seal(string(id), description)
	if err != nil {
		return err
	}
	if err := m.write(draftName(id), sealed); err != nil {
		return err
	}
	if err := m.fault.effect("rename a description", func() error { return m.root.Rename(draftName(id), describedName(id)) }); err != nil {
		return noSpace(err)
	}
	return errors.Join(m.syncDir(describedDir), m.syncDir(draftsDir))
}

// dropDraft forgets that an image is a draft: there is nothing of it any more.
func (m *meta) dropDraft(id blockdev.ID) error {
	err := m.fault.effect("end a draft", func() error { return m.root.Remove(draftName(id)) })
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return m.syncDir(draftsDir)
}

func (m *meta) description(id blockdev.ID) ([]byte, error) {
	b, err := m.read(describedName(id), string(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: it has no description", blockdev.ErrCorrupt)
	}
	return b, err
}

// forget removes a description; absent is success.
func (m *meta) forget(id blockdev.ID) error {
	err := m.fault.effect("remove a description", func() error { return m.root.Remove(describedName(id)) })
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return m.syncDir(describedDir)
}

// described lists the images that have a description, drafts those that are none yet.
func (m *meta) described() ([]blockdev.ID, error) { return m.ids(describedDir) }

func (m *meta) drafts() ([]blockdev.ID, error) { return m.ids(draftsDir) }

func (m *meta) ids(dir string) ([]blockdev.ID, error) {
	names, err := m.list(dir)
	var ids []blockdev.ID
	for _, name := range names {
		if id := blockdev.ID(name); id.Valid() {
			ids = append(ids, id)
		}
	}
	return ids, err
}

func (m *meta) list(dir string) ([]string, error) {
	d, err := m.root.Open(dir)
	if err != nil {
		return nil, err
	}
	names, err := d.Readdirnames(-1)
	return names, errors.Join(err, d.Close())
}

// noSpace gives a full filesystem its sentinel.
func noSpace(err error) error {
	if err != nil && sys.IsNoSpace(err) && !errors.Is(err, blockdev.ErrFailed) {
		return fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
	}
	return err
}
