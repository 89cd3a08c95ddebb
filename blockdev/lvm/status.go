package lvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"holdfast/blockdev"
	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// Stat implements blockdev.Backend.
func (p *Pool) Stat(ctx context.Context, id blockdev.ID) (blockdev.Info, error) {
	info, err := p.stat(ctx, id)
	return info, blockdev.Op("lvm.Stat", id, err)
}

func (p *Pool) stat(ctx context.Context, id blockdev.ID) (blockdev.Info, error) {
	if _, err := p.numbered(ctx); err != nil {
		return blockdev.Info{}, err
	}
	f, err := p.find(ctx, id)
	if err != nil {
		return blockdev.Info{}, err
	}
	used, err := p.used(ctx)
	if err != nil {
		return blockdev.Info{}, err
	}
	return p.info(f, used)
}

func (p *Pool) info(f found, used map[string]space) (info blockdev.Info, err error) {
	s := used[f.ThinID]
	info = blockdev.Info{ID: f.id, Draft: f.draft, Size: f.size, Allocated: s.mapped, Shared: s.mapped - s.exclusive}
	if info.Open, err = p.active(f.Name); err != nil {
		return info, err
	}
	if !f.draft {
		info.Description, err = p.meta.description(f.id)
	}
	return info, err
}

// List implements blockdev.Backend.
func (p *Pool) List(ctx context.Context) ([]blockdev.Info, error) {
	infos, err := p.list(ctx)
	return infos, blockdev.Op("lvm.List", "", err)
}

func (p *Pool) list(ctx context.Context) ([]blockdev.Info, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	rows, err := p.numbered(ctx)
	if err != nil {
		return nil, err
	}
	used, err := p.used(ctx)
	if err != nil {
		return nil, err
	}
	var infos []blockdev.Info
	for _, r := range rows {
		f, ok, err := p.imageOf(r)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		info, err := p.info(f, used)
		switch {
		case errors.Is(err, blockdev.ErrCorrupt):
			if err := p.putAside(ctx, f, err); err != nil {
				return nil, err
			}
		case err != nil:
			return nil, err
		default:
			infos = append(infos, info)
		}
	}
	return infos, nil
}

// imageOf reads a volume's name and looks whether it is a draft; false for what is
// neither image nor draft.
func (p *Pool) imageOf(r row) (found, bool, error) {
	f := found{row: r}
	name, ours := strings.CutPrefix(r.Name, imagePrefix)
	size, err := r.bytes()
	f.id, f.size = blockdev.ID(name), size
	if !ours || err != nil || !f.id.Valid() {
		return f, false, nil
	}
	f.draft, err = p.meta.isDraft(f.id)
	return f, true, err
}

// putAside gives an image that nothing explains a name in quarantine, its reason
// first.
func (p *Pool) putAside(ctx context.Context, f found, cause error) error {
	// Removed while we looked? Then its description went after it.
	now, err := p.find(ctx, f.id)
	if errors.Is(err, blockdev.ErrNotFound) || err == nil && now.draft {
		return nil
	}
	if err != nil {
		return err
	}
	name := unique(quarantinePrefix, f.id)
	if err := p.meta.write(quarantineDir+"/"+name, []byte(cause.Error()+"\n")); err != nil {
		return err
	}
	if err := p.meta.syncDir(quarantineDir); err != nil {
		return err
	}
	p.log.Error("an image is put into quarantine", "pool", p.Name(), "image", f.id, "name", name, "cause", cause)
	if err := p.rename(ctx, "quarantine", f.Name, name); err != nil {
		return err
	}
	return p.meta.forget(f.id)
}

// Quarantined implements blockdev.Backend.
func (p *Pool) Quarantined(ctx context.Context) ([]blockdev.Quarantine, error) {
	list, err := p.quarantined(ctx)
	return list, blockdev.Op("lvm.Quarantined", "", err)
}

func (p *Pool) quarantined(ctx context.Context) ([]blockdev.Quarantine, error) {
	rows, err := p.rows(ctx)
	if err != nil {
		return nil, err
	}
	var list []blockdev.Quarantine
	for _, r := range rows {
		if !strings.HasPrefix(r.Name, quarantinePrefix) {
			continue
		}
		size, err := r.bytes()
		if err != nil {
			return nil, err
		}
		reason, err := p.meta.root.ReadFile(quarantineDir + "/" + r.Name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		list = append(list, blockdev.Quarantine{Name: r.Name, Reason: strings.TrimSpace(string(reason)), Bytes: size})
	}
	return list, nil
}

func (m *meta) there(name string) (bool, error) {
	_, err := m.root.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// space is what a thin volume occupies, in bytes.
type space struct{ mapped, exclusive int64 }

// dmName is a volume's name in device mapper: dashes are doubled.
func (p *Pool) dmName(lv string) string {
	double := func(s string) string { return strings.ReplaceAll(s, "-", "--") }
	return double(p.group) + "-" + double(lv)
}

// Messages to a thin pool (thin-provisioning.rst, "Messages").
const (
	reserveSnapshot = "reserve_metadata_snap"
	releaseSnapshot = "release_metadata_snap"
)

// used tells what each thin volume, by its number in the pool, occupies. The
// kernel makes a snapshot of the pool's metadata for readers; there is only one,
// and one that a crash left is given back first.
func (p *Pool) used(ctx context.Context) (map[string]space, error) {
	p.usage.Lock()
	defer p.usage.Unlock()
	pool := p.dmName(p.thin) + "-tpool"
	message := func(text string) error {
		return p.fault.effect(text, func() error { return sys.MapperMessage(pool, text) })
	}
	if first := message(reserveSnapshot); first != nil {
		if err := errors.Join(message(releaseSnapshot), message(reserveSnapshot)); err != nil {
			return nil, p.explain(fmt.Errorf("the thin pool's metadata cannot be read: %w", errors.Join(first, err)))
		}
	}
	var r run.Result
	err := p.fault.effect("ask thin_ls", func() (err error) {
		r, err = run.Run(ctx, run.Cmd{
			Args:        []string{"thin_ls", "--no-headers", "--format", "DEV,MAPPED_BYTES,EXCLUSIVE_BYTES", "-m", "/dev/mapper/" + p.dmName(p.thin) + "_tmeta"},
			OutputLimit: 64 << 20,
		})
		return err
	})
	if err := errors.Join(err, message(releaseSnapshot)); err != nil {
		return nil, err
	}
	return parseUsed(r.Stdout)
}

func parseUsed(text []byte) (map[string]space, error) {
	used := map[string]space{}
	for line := range bytes.Lines(text) {
		f := strings.Fields(string(line))
		if len(f) == 0 {
			continue
		}
		if len(f) != 3 {
			return nil, fmt.Errorf("%w: thin_ls: %.100q", errNonsense, line)
		}
		mapped, err1 := strconv.ParseInt(f[1], 10, 64)
		exclusive, err2 := strconv.ParseInt(f[2], 10, 64)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("%w: thin_ls: %.100q: %w", errNonsense, line, err)
		}
		used[f[0]] = space{mapped, exclusive}
	}
	return used, nil
}

// trash is what the volumes that are being removed occupy.
func (p *Pool) trash(ctx context.Context) (int64, error) {
	rows, err := p.numbered(ctx)
	if err != nil {
		return 0, err
	}
	var removed []string
	for _, r := range rows {
		if isTrash(r) {
			removed = append(removed, r.ThinID)
		}
	}
	if len(removed) == 0 {
		return 0, nil
	}
	used, err := p.used(ctx)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, id := range removed {
		sum += used[id].exclusive
	}
	return sum, nil
}

// Reclaiming tells how many removed images still occupy space.
func (p *Pool) Reclaiming(ctx context.Context) (int, error) {
	rows, err := p.rows(ctx)
	n := 0
	for _, r := range rows {
		if isTrash(r) {
			n++
		}
	}
	return n, blockdev.Op("lvm.Reclaiming", "", err)
}
