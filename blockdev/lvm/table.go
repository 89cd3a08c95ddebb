package lvm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"holdfast/internal/sys"
)

// table is our part of the group's volumes as LVM last reported it, and what we have
// changed since. LVM is asked again only when the group's metadata has changed on
// disk otherwise: every change, whoever makes it, writes a new text and moves the
// pointer to it.
type table struct {
	mu    sync.Mutex
	stamp string
	rows  []row
}

// outcome is what a command does to our volumes.
type outcome struct {
	commits int               // how often the command writes the group's metadata; 0: not known, LVM is asked
	on      func([]row) []row // of a copy
}

// The numbers of commits are those of LVM 2.03. With a version that makes others,
// LVM is asked after each change, which is as true and takes longer.
const (
	createCommits = 2 // the volume with a message to the pool; that the pool has taken it
	removeCommits = 2
	renameCommits = 1
	extendCommits = 1
)

func adds(r row) func([]row) []row { return func(rows []row) []row { return append(rows, r) } }

func drops(name string) func([]row) []row {
	return func(rows []row) []row { return slices.DeleteFunc(rows, func(r row) bool { return r.Name == name }) }
}

func alters(name string, how func(*row)) func([]row) []row {
	return func(rows []row) []row {
		for n := range rows {
			if rows[n].Name == name {
				how(&rows[n])
			}
		}
		return rows
	}
}

// state tells one state of the group's metadata from another.
type state struct {
	stamp  string // "": cannot be told
	number int64  // of the text's version: each commit adds one
}

// changed puts an outcome into the table, if the table was right before and nobody
// else has changed the group meanwhile, which the number of commits tells.
func (p *Pool) changed(before state, does outcome) {
	rows, right := p.table.at(before.stamp)
	if does.commits == 0 || !right {
		return
	}
	if now := p.state(); now.number == before.number+int64(does.commits) {
		p.table.set(now.stamp, does.on(slices.Clone(rows)))
	}
}

// rows reports on our volumes: names and sizes. It costs a read of two sectors while
// nobody else changes the group.
func (p *Pool) rows(ctx context.Context) ([]row, error) {
	return p.rowsThat(ctx, func([]row) bool { return true })
}

// everything reports on the pool and all of its volumes, whoever made them.
func (p *Pool) everything(ctx context.Context) ([]row, error) {
	return p.report(ctx, fmt.Sprintf("lv_name=%s || pool_lv=%s", p.thin, p.thin))
}

// numbered are rows with the volumes' numbers in the pool, which LVM gives them.
func (p *Pool) numbered(ctx context.Context) ([]row, error) {
	return p.rowsThat(ctx, func(rows []row) bool { return !slices.ContainsFunc(rows, func(r row) bool { return r.ThinID == "" }) })
}

func (p *Pool) rowsThat(ctx context.Context, enough func([]row) bool) ([]row, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if rows, ok := p.table.at(p.state().stamp); ok && enough(rows) {
		return rows, nil
	}
	// Not beside a change of ours: LVM would make us wait for it, and it ends with the
	// table as it should be.
	p.changing.Lock()
	defer p.changing.Unlock()
	stamp := p.state().stamp
	if rows, ok := p.table.at(stamp); ok && enough(rows) {
		return rows, nil
	}
	rows, err := p.report(ctx, fmt.Sprintf("pool_lv=%s && lv_tags=%s", p.thin, p.tag()))
	if err != nil {
		return nil, err
	}
	// Taken before the report: what changed meanwhile is asked for the next time.
	p.table.set(stamp, rows)
	return rows, nil
}

// at gives the rows, if they are of a state of the group.
func (t *table) at(stamp string) ([]row, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rows, stamp != "" && stamp == t.stamp
}

func (t *table) set(stamp string, rows []row) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stamp, t.rows = stamp, rows
}

// state reads the group's state from its devices. It has no stamp when that cannot
// be read: then LVM is asked each time.
func (p *Pool) state() state {
	p.devicesMu.RLock()
	defer p.devicesMu.RUnlock()
	var all strings.Builder
	var s state
	for _, path := range p.devices {
		one, err := deviceState(path)
		if err != nil {
			return state{}
		}
		all.WriteString(one.stamp)
		s.number = max(s.number, one.number)
	}
	s.stamp = all.String()
	return s
}

var (
	errNoLabel = errors.New("no LVM label")
	labelMagic = []byte("LABELONE")
	areaMagic  = []byte(" LVM2 x[5A%r0N*>")
)

const (
	sectorsWithLabel = 4
	deviceHead       = 4096
)

// deviceState reads where a physical volume says that its group's metadata is:
// label, header and the pointers of each metadata area (LVM2's
// lib/format_text/layout.h and lib/label/label.h).
func deviceState(path string) (state, error) {
	head, err := sys.ReadDirect(path, 0, deviceHead)
	if err != nil {
		return state{}, err
	}
	areas, err := metadataAreas(head)
	if err != nil {
		return state{}, err
	}
	var all strings.Builder
	var s state
	for _, at := range areas {
		b, err := readAt(path, at)
		if err != nil {
			return state{}, err
		}
		// checksum, magic, version, start, size, and four pointers of 24 bytes
		area := b[:40+4*24]
		if !bytes.Equal(area[4:20], areaMagic) {
			return state{}, errNoLabel
		}
		all.Write(area)
		text := int64(binary.LittleEndian.Uint64(area[40:])) //nolint:gosec // compared below
		size := int64(binary.LittleEndian.Uint64(area[32:])) //nolint:gosec // compared below
		if text <= 0 || text >= size {
			continue // an area without a text: the group keeps its metadata on other devices
		}
		if b, err = readAt(path, at+text); err != nil {
			return state{}, err
		}
		s.number = max(s.number, textNumber(b))
	}
	s.stamp = all.String()
	return s, nil
}

// readAt reads at least a block from any offset.
func readAt(path string, at int64) ([]byte, error) {
	aligned := at / deviceHead * deviceHead
	b, err := sys.ReadDirect(path, aligned, 2*deviceHead)
	if err != nil {
		return nil, err
	}
	return b[at-aligned:], nil
}

var numberForm = regexp.MustCompile(`(?m)^\s*seqno = ([0-9]{1,18})$`)

// textNumber reads the version number at the beginning of a group's metadata, 0 for
// none. Texts begin at whole sectors.
func textNumber(text []byte) int64 {
	found := numberForm.FindSubmatch(text[:min(len(text), sector)])
	if found == nil {
		return 0
	}
	n, _ := strconv.ParseInt(string(found[1]), 10, 64) // of digits, few enough
	return n
}

// metadataAreas gives the offsets of a physical volume's metadata areas.
func metadataAreas(head []byte) ([]int64, error) {
	for n := range sectorsWithLabel {
		label := head[n*sector : (n+1)*sector]
		if !bytes.HasPrefix(label, labelMagic) {
			continue
		}
		at := int(binary.LittleEndian.Uint32(label[20:]))
		const uuidAndSize = 32 + 8
		if at < 32 || at+uuidAndSize > len(label) {
			return nil, errNoLabel
		}
		return areaList(label[at+uuidAndSize:])
	}
	return nil, errNoLabel
}

// areaList reads two lists of (offset, size), each ended by zeroes: first of the
// data, then of the metadata.
func areaList(b []byte) (found []int64, err error) {
	lists := 0
	for ; len(b) >= 16; b = b[16:] {
		offset := int64(binary.LittleEndian.Uint64(b)) //nolint:gosec // compared below
		switch {
		case offset == 0:
			if lists++; lists == 2 {
				return found, nil
			}
		case lists == 1 && offset > 0:
			found = append(found, offset)
		}
	}
	return nil, errNoLabel
}

// active tells whether a volume has a device, and how many use it.
func (p *Pool) active(name string) (bool, error) {
	_, ok, err := sys.MapperDevice(p.dmName(name))
	return ok, err
}
