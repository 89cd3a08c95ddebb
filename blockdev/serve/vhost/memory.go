package vhost

import (
	"encoding/binary"
	"errors"
	"unsafe"

	"holdfast/internal/sys"
)

// maxRegions bounds the pieces that a guest's memory may come in.
const maxRegions = 32

const regionSize = 32 // of its description in a message

// region is a piece of the guest's memory.
type region struct {
	guest, user uint64 // where it begins, for the guest and for the VMM
	size        uint64
	offset      uint64 // into the mapping
	mapping     []byte
}

// memory is the guest's memory. It does not change while a loop runs.
type memory struct{ regions []region }

// add maps a region as a message describes it. The descriptor stays the caller's.
func (m *memory) add(description []byte, fd int) error {
	r := parseRegion(description)
	if len(m.regions) == maxRegions {
		return violated("more than %d regions", maxRegions)
	}
	end := r.offset + r.size
	if r.size == 0 || end < r.offset || end > 1<<46 || r.guest+r.size < r.guest || r.user+r.size < r.user {
		return violated("region of %d bytes at %#x, offset %d", r.size, r.guest, r.offset)
	}
	for _, o := range m.regions {
		if r.guest < o.guest+o.size && o.guest < r.guest+r.size {
			return violated("regions overlap at %#x", r.guest)
		}
	}
	var err error
	if r.mapping, err = sys.MapShared(fd, int64(end)); err != nil {
		return err
	}
	m.regions = append(m.regions, r)
	return nil
}

func parseRegion(b []byte) region {
	word := func(n int) uint64 { return binary.LittleEndian.Uint64(b[8*n:]) }
	return region{guest: word(0), size: word(1), user: word(2), offset: word(3)}
}

// remove unmaps the region that is described like this one.
func (m *memory) remove(description []byte) error {
	gone := parseRegion(description)
	for n, r := range m.regions {
		if r.guest == gone.guest && r.size == gone.size && r.user == gone.user {
			m.regions = append(m.regions[:n], m.regions[n+1:]...)
			return sys.Unmap(r.mapping)
		}
	}
	return violated("no region at %#x", gone.guest)
}

func (m *memory) close() error {
	var errs []error
	for _, r := range m.regions {
		errs = append(errs, sys.Unmap(r.mapping))
	}
	m.regions = nil
	return errors.Join(errs...)
}

// at gives the memory of a range of the guest's addresses, or the part of it up to
// the region's end; nil where there is none.
func (m *memory) at(guest uint64, length uint64) []byte {
	for n := range m.regions {
		r := &m.regions[n]
		if off := guest - r.guest; guest >= r.guest && off < r.size {
			start := r.offset + off
			return r.mapping[start : start+min(length, r.size-off)]
		}
	}
	return nil
}

// ofUser gives the memory of a range of the VMM's addresses, which must be in one
// region and aligned.
func (m *memory) ofUser(user, length, align uint64) unsafe.Pointer {
	for n := range m.regions {
		r := &m.regions[n]
		off := user - r.user
		if user < r.user || off >= r.size || length > r.size-off {
			continue
		}
		p := unsafe.Pointer(&r.mapping[r.offset+off])
		if uintptr(p)%uintptr(align) != 0 {
			return nil
		}
		return p
	}
	return nil
}
