package sparse

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// The names in a directory of the quarantine.
const (
	contentName = "content"
	reasonName  = "reason"
)

// List implements blockdev.Backend.
func (p *Pool) List(ctx context.Context) ([]blockdev.Info, error) {
	infos, err := p.list(ctx)
	return infos, blockdev.Op("sparse.List", "", err)
}

func (p *Pool) list(ctx context.Context) (infos []blockdev.Info, err error) {
	told := p.askHeld(ctx)
	for _, parent := range []string{imagesDir, draftsDir} {
		entries, err := os.ReadDir(p.path(parent))
		if err != nil {
			return nil, err
		}
		for _, entry := range entries {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			info, ok, err := p.listOne(ctx, parent, entry, told)
			if err != nil {
				return nil, err
			}
			if ok {
				infos = append(infos, info)
			}
		}
	}
	return infos, nil
}

// listOne inspects one entry of images/ or drafts/. ok is false for one that
// went away meanwhile, and for one that was put aside.
func (p *Pool) listOne(ctx context.Context, parent string, entry os.DirEntry, told heldByWorkers) (info blockdev.Info, ok bool, err error) {
	id, path := blockdev.ID(entry.Name()), p.path(parent, entry.Name())
	if !id.Valid() || !entry.IsDir() {
		return info, false, p.putAside(path, "it is not an image")
	}
	info, err = p.inspect(id, path, parent == draftsDir, told)
	if errors.Is(err, blockdev.ErrCorrupt) {
		// Removed while we looked? Then it has not all its files any more.
		if there, err := exists(path); err != nil || !there {
			return info, false, err
		}
		return p.listDamaged(ctx, id, parent, path, told)
	}
	return info, err == nil, err
}

// listDamaged puts an image aside that is damaged also when nobody works on it. One
// that is in use stays where it is, and is not listed.
func (p *Pool) listDamaged(ctx context.Context, id blockdev.ID, parent, path string, told heldByWorkers) (info blockdev.Info, ok bool, err error) {
	done, err := p.turns.take(ctx, id)
	if err != nil {
		return info, false, err
	}
	defer done()
	info, err = p.inspect(id, path, parent == draftsDir, told)
	switch {
	case err == nil || !errors.Is(err, blockdev.ErrCorrupt):
		return info, err == nil, err
	case info.Open || p.isAccessed(id):
		p.log.Error("an image that is in use does not explain itself", "id", id, "error", err)
		return info, false, nil
	}
	return info, false, p.putAside(path, err.Error())
}

// putAside moves something that nothing explains to the quarantine: its reason
// first, so that it never lies there without.
func (p *Pool) putAside(path, reason string) error {
	name := unique(filepath.Base(path))
	dir := p.path(quarantineDir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return noSpace(err)
	}
	if err := writeFile(dir+"/"+reasonName, []byte(reason+"\n")); err != nil {
		return err
	}
	if err := p.at("quarantine.rename"); err != nil {
		return err
	}
	err := os.Rename(path, dir+"/"+contentName)
	if errors.Is(err, fs.ErrNotExist) {
		return os.RemoveAll(dir)
	}
	if err != nil {
		return noSpace(err)
	}
	p.log.Error("put aside what nothing explains", "path", path, "quarantine", name, "reason", reason)
	for _, dir := range []string{dir, p.path(quarantineDir), filepath.Dir(path)} {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// Quarantined implements blockdev.Backend.
func (p *Pool) Quarantined(ctx context.Context) ([]blockdev.Quarantine, error) {
	found, err := p.quarantined(ctx)
	return found, blockdev.Op("sparse.Quarantined", "", err)
}

func (p *Pool) quarantined(ctx context.Context) (found []blockdev.Quarantine, err error) {
	entries, err := os.ReadDir(p.path(quarantineDir))
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		dir := p.path(quarantineDir, entry.Name())
		if there, err := exists(dir + "/" + contentName); err != nil || !there {
			continue // of a List cut short, which put nothing here
		}
		reason, err := os.ReadFile(dir + "/" + reasonName)
		if err != nil {
			reason = []byte("the reason is lost: " + err.Error())
		}
		found = append(found, blockdev.Quarantine{Name: entry.Name(), Reason: strings.TrimSpace(string(reason)), Bytes: allocatedBelow(dir)})
	}
	return found, nil
}

// allocatedBelow adds up the space of all files below a directory that have no other
// name. What goes away meanwhile does not count.
func allocatedBelow(dir string) (bytes int64) {
	_ = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			if status, err := sys.StatusAt(path); err == nil && status.Links == 1 {
				bytes += status.Allocated
			}
		}
		return nil
	})
	return bytes
}
