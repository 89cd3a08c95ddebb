package sparse

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
	"path/filepath"
	"sync"
	"sync/atomic"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/opened"
	"holdfast/blockdev/serve/overlay"
)

// The names in a pool; see the package comment.
const (
	poolFile        = "pool.json"
	lockFile        = "lock"
	imageFile       = "image"
	descriptionFile = "description.json"

	imagesDir     = "images"
	draftsDir     = "drafts"
	trashDir      = "trash"
	quarantineDir = "quarantine"
	stagingDir    = "staging"
	manifestsDir  = "manifests"
	addressesDir  = "addresses"
)

// poolVersion is the version of the layout, in pool.json.
const poolVersion = 1

// sector is what sizes are multiples of, in bytes: a device has no smaller unit.
const sector = 512

// Options of a pool.
type Options struct {
	Host string       // id of this host, noted when the pool is made
	Log  *slog.Logger // nil: none
	// Rate bounds how fast closed layered images are made flat while nobody waits for
	// it, in bytes per second; 0: 64 MiB; below: that waits until somebody does.
	Rate int64
	// Workers serve images over vhost-user and NBD. nil: then none is layered, and all
	// open as File or Block only.
	Workers Workers
	// Prefixes are those of the addresses that stores of bases far away may redirect to:
	// the operator's.
	Prefixes overlay.Prefixes
}

// Identity is what pool.json says.
type Identity struct {
	Version int    `json:"version"`
	UUID    string `json:"uuid"`
	Host    string `json:"host"` // where it was made
}

// Pool is a directory of images. It is a blockdev.Backend and all that a
// backend can be besides.
type Pool struct {
	calls // to workers

	dir      string
	identity Identity
	log      *slog.Logger
	lock     *os.File

	workers  Workers
	layers   bool // images may be layered: there are workers that serve them
	reflinks bool // files here can share bytes
	rate     int64

	turns    turns
	changing sync.Mutex // held while a chain changes

	mu       sync.Mutex
	openings map[blockdev.ID]*opening // rebuilt from the kernel by Open
	accessed map[blockdev.ID]int      // handles of Access
	descents map[blockdev.ID]*descent // merges down that ended early

	shared    sharedSum
	chunks    chunkFiles
	prefixes  overlay.Prefixes // that stores may redirect to
	addresses addresses

	wake    chan struct{} // tells that there is trash
	flatter chan struct{} // tells that there are layered images
	stop    context.CancelFunc
	done    sync.WaitGroup

	onFlat atomic.Pointer[func(blockdev.ID)] // whom to tell; nil: nobody

	crash func(point string) error // in tests: stands for a crash there
}

var (
	_ blockdev.Backend = (*Pool)(nil)
	_ blockdev.Cloner  = (*Pool)(nil)
	_ blockdev.Trimmer = (*Pool)(nil)

	_ blockdev.Meter      = (*Pool)(nil)
	_ blockdev.Accountant = (*Pool)(nil)
)

// Open opens the pool in dir, or makes one there if dir holds none. Devices that
// an earlier process left open are found. blockdev.ErrBusy when another process
// uses the pool; blockdev.ErrCorrupt when dir holds images but not the pool's
// own file, or a format of another version.
func Open(ctx context.Context, dir string, o Options) (*Pool, error) {
	p, err := open(ctx, dir, o)
	return p, blockdev.Op("sparse.Open", "", err)
}

func open(ctx context.Context, dir string, o Options) (*Pool, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	p := &Pool{dir: dir, log: o.Log, rate: o.Rate, workers: o.Workers, layers: o.Workers != nil, prefixes: o.Prefixes, openings: map[blockdev.ID]*opening{}, accessed: map[blockdev.ID]int{}, descents: map[blockdev.ID]*descent{},
		wake: make(chan struct{}, 1), flatter: make(chan struct{}, 1)}
	p.calls = calls{Room: "sparse", Worker: p.observed}
	if p.rate == 0 {
		p.rate = defaultRate
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, noSpace(err)
	}
	if p.lock, err = takeLock(p.path(lockFile)); err != nil {
		return nil, err
	}
	if err = p.load(o); err == nil {
		p.reflinks, err = canReflink(p.path(stagingDir))
	}
	if err == nil {
		err = p.readAddresses()
	}
	if err == nil {
		err = p.dropAddresses()
	}
	if err == nil {
		err = p.findOpenings(ctx)
	}
	if err != nil {
		p.unlock()
		return nil, err
	}
	background, stop := context.WithCancel(context.Background())
	p.stop = stop
	p.done.Go(func() { p.whenever(background, p.wake, "reclaim removed images", p.emptyTrash) })
	if p.rate > 0 {
		p.done.Go(func() { p.whenever(background, p.flatter, "make layered images flat", p.flattenAll) })
	}
	p.wakeReclaim()
	p.wakeBackground()
	return p, nil
}

// load reads pool.json, or makes the pool.
func (p *Pool) load(o Options) error {
	payload, err := readEnvelope(p.path(poolFile), poolFile)
	if errors.Is(err, fs.ErrNotExist) {
		return p.found(o)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.path(poolFile), err)
	}
	if err := json.Unmarshal(payload, &p.identity); err != nil {
		return fmt.Errorf("%s: %w: %w", p.path(poolFile), blockdev.ErrCorrupt, err)
	}
	if p.identity.Version != poolVersion {
		return fmt.Errorf("%s: format version %d, this program knows %d: %w", p.dir, p.identity.Version, poolVersion, blockdev.ErrCorrupt)
	}
	return p.makeDirs()
}

// found makes a pool. pool.json comes last: with it the pool is complete.
func (p *Pool) found(o Options) error {
	entries, err := os.ReadDir(p.path(imagesDir))
	if err == nil && len(entries) > 0 {
		return fmt.Errorf("%s has images but no %s: %w", p.dir, poolFile, blockdev.ErrCorrupt)
	}
	if err := p.makeDirs(); err != nil {
		return err
	}
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	p.identity = Identity{Version: poolVersion, Host: o.Host,
		UUID: fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])}
	payload, err := json.Marshal(p.identity)
	if err != nil {
		return err
	}
	return p.replaceEnvelope(p.dir, poolFile, poolFile, payload)
}

func (p *Pool) makeDirs() error {
	made := false
	for _, name := range []string{imagesDir, draftsDir, trashDir, quarantineDir, stagingDir, manifestsDir, addressesDir} {
		switch err := os.Mkdir(p.path(name), 0o700); {
		case err == nil:
			made = true
		case !errors.Is(err, fs.ErrExist):
			return noSpace(err)
		}
	}
	if !made {
		return nil
	}
	return syncDir(p.dir)
}

// Shutdown stops the pool's background work and lets another process use it.
// Devices stay open, so that their users notice nothing.
func (p *Pool) Shutdown() {
	p.stop()
	p.done.Wait()
	p.unlock()
}

func (p *Pool) unlock() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, o := range p.openings {
		if o.lock != nil {
			dropLock(o.lock)
		}
		delete(p.openings, id)
	}
	dropLock(p.lock)
}

// Identity tells what the pool's own file says.
func (p *Pool) Identity() Identity { return p.identity }

// Staging is a directory on the pool's filesystem for its users' files.
func (p *Pool) Staging() string { return p.path(stagingDir) }

// Manifests is a directory on the pool's filesystem for what its users keep about
// images and can make again from them.
func (p *Pool) Manifests() string { return p.path(manifestsDir) }

func (p *Pool) path(parts ...string) string {
	return filepath.Join(append([]string{p.dir}, parts...)...)
}

func (p *Pool) image(id blockdev.ID) string { return p.path(imagesDir, string(id)) }
func (p *Pool) draft(id blockdev.ID) string { return p.path(draftsDir, string(id)) }

// at is a point between two side effects.
func (p *Pool) at(point string) error {
	if p.crash == nil {
		return nil
	}
	return p.crash(point)
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

func checkSize(size int64) error {
	if size <= 0 || size%sector != 0 {
		return fmt.Errorf("size %d is not a positive multiple of %d: %w", size, sector, blockdev.ErrInvalid)
	}
	return nil
}

// locate tells where an image, or else a draft, is.
func (p *Pool) locate(id blockdev.ID) (dir string, draft bool, err error) {
	if found, err := exists(p.image(id)); found || err != nil {
		return p.image(id), false, err
	}
	if found, err := exists(p.draft(id)); found || err != nil {
		return p.draft(id), true, err
	}
	return "", false, blockdev.ErrNotFound
}

// takeLock takes the lock on a file beside what it guards. It ends with the
// process.
func takeLock(path string) (*os.File, error) {
	f, err := opened.Lock(path)
	return f, noSpace(err)
}

func dropLock(f *os.File) { opened.Unlock(f) }

// unique makes a name that nothing has, for trash and quarantine.
func unique(name string) string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails
	return name + "." + hex.EncodeToString(b[:])
}
