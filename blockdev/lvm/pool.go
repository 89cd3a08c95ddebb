package lvm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/opened"
)

// The first parts of our names, before an ID.
const (
	imagePrefix      = "hfi-"
	trashPrefix      = "hft-"
	quarantinePrefix = "hfq-"
	metaPrefix       = "hf-meta-" // before the name of its pool
)

const (
	poolVersion = 1
	sector      = 512
	markTag     = "holdfast"
	poolTag     = "holdfast.pool." // and the pool's UUID
	// defaultMeta is room for the descriptions of some 50,000 images, in bytes.
	defaultMeta = 256 << 20
	// leastMeta is the size from which our ext4 has a journal: without one a power cut
	// takes descriptions with it.
	leastMeta = 16 << 20
)

// Options of a pool.
type Options struct {
	Host string       // id of this host, noted when the pool is made
	Log  *slog.Logger // nil: none
	// MetaBytes is the size of the volume for descriptions when it is made, at least
	// 16 MiB; 0: 256 MiB.
	MetaBytes int64
	Extend    Extend // when the pool gets more space from its volume group

	// Workers serve images over sockets; nil: images are block devices alone. Notes is
	// then a directory that lasts until the host's next boot, for what is open so; it is
	// given also where workers are no more, as long as some may run.
	Workers opened.Workers
	Notes   string

	fault fault // of tests
}

// Identity is what the pool's own file says.
type Identity struct {
	Version int    `json:"version"`
	UUID    string `json:"uuid"`
	Host    string `json:"host"` // where it was made
}

// Pool is a thin pool of LVM with images in it. It is a blockdev.Backend and Cloner.
type Pool struct {
	toWorkers

	group, thin string // names of the volume group and of the thin pool in it
	extent      int64  // bytes
	chunk       int64  // of the thin pool: what is allocated at once, bytes
	identity    Identity
	log         *slog.Logger
	extending   Extend
	workers     opened.Workers // nil: none
	notes       string
	fault       fault
	meta        *meta
	table       table

	devicesMu sync.RWMutex
	devices   []string // of the group

	changing sync.Mutex // of the group's metadata
	usage    sync.Mutex // of the pool's one metadata snapshot

	mu   sync.Mutex
	mine map[blockdev.ID]bool // openings that this process made or was asked for

	wake chan struct{}
	stop context.CancelFunc
	work sync.WaitGroup // in the background
}

var (
	_ blockdev.Backend     = (*Pool)(nil)
	_ blockdev.Cloner      = (*Pool)(nil)
	_ blockdev.Snapshotter = (*Pool)(nil)

	_ blockdev.HealthReporter = (*Pool)(nil)
	_ blockdev.Meter          = (*Pool)(nil)
)

var nameForm = regexp.MustCompile(`^[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,63}$`)

// Open opens the thin pool "group/pool" and makes it ours when it is not: the
// volume for descriptions is made. blockdev.ErrInvalid, with what to do, for a
// pool that is unfit: not there, not thin, or one that shows old data (zeroing
// off). blockdev.ErrBusy when another process uses it.
func Open(ctx context.Context, name string, o Options) (*Pool, error) {
	p, err := open(ctx, name, o)
	return p, blockdev.Op("lvm.Open", "", err)
}

func open(ctx context.Context, name string, o Options) (*Pool, error) {
	group, thin, ok := strings.Cut(name, "/")
	if !ok || !nameForm.MatchString(group) || !nameForm.MatchString(thin) {
		return nil, fmt.Errorf("%w: %q is not of the form group/pool", blockdev.ErrInvalid, name)
	}
	if err := errors.Join(o.Extend.check(), haveTools()); err != nil {
		return nil, err
	}
	p := &Pool{group: group, thin: thin, log: o.Log, extending: o.Extend, workers: o.Workers, notes: o.Notes, fault: o.fault, mine: map[blockdev.ID]bool{}, wake: make(chan struct{}, 1)}
	p.toWorkers = toWorkers{Room: "lvm", Worker: p.observed}
	if p.workers != nil && p.notes == "" {
		return nil, fmt.Errorf("%w: workers without a directory for notes", blockdev.ErrInvalid)
	}
	if p.notes != "" {
		if err := os.MkdirAll(p.notes, 0o700); err != nil {
			return nil, err
		}
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	if p.extending.By == 0 {
		p.extending.By = defaultExtend
	}
	if o.MetaBytes == 0 {
		o.MetaBytes = defaultMeta
	}
	o.MetaBytes = max(o.MetaBytes, leastMeta)
	var err error
	if p.devices, p.extent, err = groupDevices(ctx, group); err != nil {
		return nil, invalid(err)
	}
	rows, err := p.everything(ctx)
	if err == nil {
		err = p.fit(rows)
	}
	if err != nil {
		return nil, invalid(err)
	}
	if p.meta, err = p.openMeta(ctx, rows, o); err != nil {
		return nil, err
	}
	if err := errors.Join(p.warnOfSettings(), p.tidy(ctx)); err != nil {
		return nil, errors.Join(err, p.meta.close())
	}
	background, stop := context.WithCancel(context.Background())
	p.stop = stop
	p.work.Go(func() { p.reclaim(background) })
	if p.extending.At > 0 {
		p.work.Go(func() { p.watch(background) })
	}
	p.wakeReclaim()
	return p, nil
}

// invalid gives a group or pool that is not there its sentinel.
func invalid(err error) error {
	if errors.Is(err, errNoGroup) && !errors.Is(err, blockdev.ErrInvalid) {
		return fmt.Errorf("%w: %w", blockdev.ErrInvalid, err)
	}
	return err
}

// fit checks that the pool is one that images are safe in.
func (p *Pool) fit(rows []row) error {
	n := slices.IndexFunc(rows, func(r row) bool { return r.Name == p.thin })
	if n < 0 {
		return fmt.Errorf("%w: there is no %s in volume group %s", errNoGroup, p.thin, p.group)
	}
	r := rows[n]
	if !strings.Contains(r.Layout, "pool") || !strings.Contains(r.Layout, "thin") {
		return fmt.Errorf("%w: %s/%s is no thin pool but %q: lvcreate --type thin-pool", blockdev.ErrInvalid, p.group, p.thin, r.Layout)
	}
	var err error
	if p.chunk, err = strconv.ParseInt(r.Chunk, 10, 64); err != nil || p.chunk < sector {
		return fmt.Errorf("%w: lvs: chunks of %q bytes", errNonsense, r.Chunk)
	}
	if r.Zero != "zero" {
		return p.unzeroed()
	}
	return nil
}

// lv is a volume as LVM's commands name it.
func (p *Pool) lv(name string) string { return p.group + "/" + name }

// metaName is the volume for descriptions.
func (p *Pool) metaName() string { return metaPrefix + p.thin }

// node is a volume's device.
func (p *Pool) node(name string) string { return "/dev/" + p.group + "/" + name }

// tag marks what is ours in this pool.
func (p *Pool) tag() string { return poolTag + p.identity.UUID }

// Identity tells what the pool's own file says.
func (p *Pool) Identity() Identity { return p.identity }

// Name is the pool as LVM names it.
func (p *Pool) Name() string { return p.group + "/" + p.thin }

// Shutdown stops the pool's background work and lets another process use it.
// Devices stay open, so that their users notice nothing.
func (p *Pool) Shutdown() {
	p.stop()
	p.work.Wait()
	if err := p.meta.close(); err != nil {
		p.log.Warn("the volume of descriptions was not let go", "pool", p.Name(), "err", err)
	}
}

// tidy removes descriptions, and names of drafts, that no image has: a crash came
// between the two.
func (p *Pool) tidy(ctx context.Context) error {
	rows, err := p.rows(ctx)
	if err != nil {
		return err
	}
	images := map[string]bool{}
	for _, r := range rows {
		images[strings.TrimPrefix(r.Name, imagePrefix)] = true
	}
	for _, kind := range []struct {
		list   func() ([]blockdev.ID, error)
		forget func(blockdev.ID) error
	}{{p.meta.described, p.meta.forget}, {p.meta.drafts, p.meta.dropDraft}} {
		ids, err := kind.list()
		if err != nil {
			return err
		}
		for _, id := range ids {
			if images[string(id)] {
				continue
			}
			if err := kind.forget(id); err != nil {
				return err
			}
		}
	}
	return nil
}

// check is what every call checks first.
func check(ctx context.Context, ids ...blockdev.ID) error {
	for _, id := range ids {
		if !id.Valid() {
			return fmt.Errorf("image id %q: %w", string(id), blockdev.ErrInvalid)
		}
	}
	return ctx.Err()
}

func (p *Pool) checkSize(size int64) (int64, error) {
	if size <= 0 || size%sector != 0 {
		return 0, fmt.Errorf("size %d is not a positive multiple of %d: %w", size, sector, blockdev.ErrInvalid)
	}
	return p.roundUp(size), nil
}

// roundUp gives whole extents.
func (p *Pool) roundUp(size int64) int64 { return (size + p.extent - 1) / p.extent * p.extent }

// unique makes a name that nothing has.
func unique(prefix string, id blockdev.ID) string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails
	return prefix + string(id) + "." + hex.EncodeToString(b[:])
}

func newUUID() string {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}

// loadIdentity reads the pool's own file, or makes it.
func (m *meta) loadIdentity(host, uuid string) (Identity, error) {
	var i Identity
	payload, err := m.read(poolFile, poolFile)
	if errors.Is(err, fs.ErrNotExist) {
		i = Identity{Version: poolVersion, UUID: uuid, Host: host}
		if payload, err = json.Marshal(i); err != nil {
			return i, err
		}
		return i, m.replace(poolFile, poolFile, payload)
	}
	if err != nil {
		return i, err
	}
	if err := json.Unmarshal(payload, &i); err != nil {
		return i, fmt.Errorf("%w: %s: %w", blockdev.ErrCorrupt, poolFile, err)
	}
	if i.Version != poolVersion {
		return i, fmt.Errorf("%w: format version %d, this program knows %d", blockdev.ErrCorrupt, i.Version, poolVersion)
	}
	return i, nil
}
