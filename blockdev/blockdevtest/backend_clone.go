package blockdevtest

import (
	"errors"

	"holdfast/blockdev"
)

// cloner gives the backend's Cloner, nil if it cannot clone here; that it then
// says so, and leaves nothing, is tested on the way.
func (s *suite) cloner() blockdev.Cloner {
	s.Helper()
	c, ok := s.b.(blockdev.Cloner)
	if !ok {
		if s.place.Clones {
			s.Fatal("the backend is no Cloner")
		}
		return nil
	}
	if s.place.Clones {
		return c
	}
	src, dst := s.publishedAs(blockdev.PrefixSource, "text"), NewID(blockdev.PrefixVolume)
	s.is(c.Clone(s.ctx(), dst, src, mib), errors.ErrUnsupported, "clone where the pool cannot")
	s.absent(dst)
	return nil
}

func clone(s *suite) {
	c := s.cloner()
	if c == nil {
		return
	}
	src, dst := s.publishedAs(blockdev.PrefixSource, "original"), NewID(blockdev.PrefixVolume)
	s.is(c.Clone(s.ctx(), dst, NewID(blockdev.PrefixVolume), mib), blockdev.ErrNotFound, "clone of nothing")
	draft := NewID(blockdev.PrefixVolume)
	s.ok(s.b.Create(s.ctx(), draft, mib))
	s.is(c.Clone(s.ctx(), dst, draft, mib), blockdev.ErrNotFound, "clone of a draft")
	s.absent(dst)

	s.ok(s.b.Create(s.ctx(), dst, 2*mib)) // a draft from an attempt before
	s.write(dst, 8192, "leftover")
	s.ok(c.Clone(s.ctx(), dst, src, mib))
	if info := s.stat(dst); !info.Draft || info.Size != mib {
		s.Errorf("a clone: %+v", info)
	}
	s.reads(dst, 8192, "")
	s.ok(s.b.Publish(s.ctx(), dst, []byte("clone")))
	s.is(c.Clone(s.ctx(), dst, src, mib), blockdev.ErrExists, "clone over an image")
	if info := s.stat(dst); info.Shared <= 0 || info.Shared > info.Allocated {
		s.Errorf("a clone shares its bytes: %+v", info)
	}
	s.reads(dst, 0, "original")
	s.write(dst, 0, "changed in the clone")
	if !s.place.Layered {
		s.write(src, mib-4096, "changed in the source")
	}
	s.restart()
	s.reads(src, 0, "original")
	s.reads(dst, mib-4096, "original")
	s.reads(dst, 0, "changed in the clone")
	s.ok(s.b.Remove(s.ctx(), src))
	s.reads(dst, mib-4096, "original")
}

func cloneGrown(s *suite) {
	c := s.cloner()
	if c == nil {
		return
	}
	src, dst := s.publishedAs(blockdev.PrefixSource, "original"), NewID(blockdev.PrefixVolume)
	if s.rounded(mib/2) < mib {
		s.is(c.Clone(s.ctx(), dst, src, mib/2), blockdev.ErrInvalid, "clone smaller than its source")
		s.absent(dst)
	}
	s.ok(c.Clone(s.ctx(), dst, src, 4*mib))
	if info := s.stat(dst); info.Size != 4*mib {
		s.Errorf("a grown clone: %+v", info)
	}
	s.reads(dst, mib-4096, "original")
	s.reads(dst, mib, "")
	s.reads(dst, 4*mib-4096, "")
	if info := s.stat(src); info.Size != mib {
		s.Errorf("the source has changed: %+v", info)
	}
}
