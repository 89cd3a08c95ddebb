package lvm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"holdfast/internal/sys"
)

// table is the pool and its volumes as LVM last reported them. LVM is asked again
// only when the group's metadata has changed on disk since: every change, whoever
// makes it, writes a new text and moves the pointer to it.
type table struct {
	mu    sync.Mutex
	stamp string
	all   []row
	ours  []row // of them, with our tag
}

// rows reports on our volumes. It costs a read of one sector while nothing changes.
func (p *Pool) rows(ctx context.Context) ([]row, error) {
	p.table.mu.Lock()
	defer p.table.mu.Unlock()
	_, err := p.refresh(ctx)
	return p.table.ours, err
}

// everything reports on the pool and all of its volumes, whoever made them.
func (p *Pool) everything(ctx context.Context) ([]row, error) {
	p.table.mu.Lock()
	defer p.table.mu.Unlock()
	return p.refresh(ctx)
}

func (p *Pool) refresh(ctx context.Context) ([]row, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	stamp := p.stamp()
	if stamp != "" && stamp == p.table.stamp {
		return p.table.all, nil
	}
	all, err := p.report(ctx, fmt.Sprintf("lv_name=%s || pool_lv=%s", p.thin, p.thin))
	if err != nil {
		p.table.ours = nil
		return nil, err
	}
	var ours []row
	for _, r := range all {
		if r.Pool == p.thin && slices.Contains(r.tags(), p.tag()) {
			ours = append(ours, r)
		}
	}
	// Taken before the report: what changed meanwhile is asked for the next time.
	p.table.stamp, p.table.all, p.table.ours = stamp, all, ours
	return all, nil
}

// stamp tells one state of the group's metadata from another, "" when it cannot be
// read: then LVM is asked each time.
func (p *Pool) stamp() string {
	p.devicesMu.RLock()
	defer p.devicesMu.RUnlock()
	var all strings.Builder
	for _, path := range p.devices {
		s, err := deviceStamp(path)
		if err != nil {
			return ""
		}
		all.WriteString(s)
	}
	return all.String()
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

// deviceStamp reads where a physical volume says that its group's metadata is:
// label, header and the pointers of each metadata area (LVM2's
// lib/format_text/layout.h and lib/label/label.h).
func deviceStamp(path string) (string, error) {
	head, err := sys.ReadDirect(path, 0, deviceHead)
	if err != nil {
		return "", err
	}
	areas, err := metadataAreas(head)
	if err != nil {
		return "", err
	}
	var all strings.Builder
	for _, at := range areas {
		aligned := at / deviceHead * deviceHead
		b, err := sys.ReadDirect(path, aligned, 2*deviceHead)
		if err != nil {
			return "", err
		}
		// checksum, magic, version, start, size, and four pointers of 24 bytes
		area := b[at-aligned:][:40+4*24]
		if !bytes.Equal(area[4:20], areaMagic) {
			return "", errNoLabel
		}
		all.Write(area)
	}
	return all.String(), nil
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
