package ext4fill

import (
	"fmt"

	"holdfast/blockdev/filesystem/internal/ext4disk"
)

// finish writes what counts: bitmaps, group descriptors, the superblock. Copies
// of the last two stay as mkfs left them, as the kernel leaves them.
func (b *builder) finish() error {
	if err := b.space.leave(); err != nil {
		return err
	}
	if err := b.inodeMaps(); err != nil {
		return err
	}
	im := b.im
	for g, n := range b.dirs {
		im.group(g).add(0x10, 0x30, n)
	}
	free := int64(0)
	for g := range im.groups {
		free += im.group(g).joined(0xC, 0x2C)
		im.group(g).set16(ext4disk.GroupSumAt, im.groupSum(g))
	}
	for done := 0; done < len(im.gdt); done += writePiece {
		piece := im.gdt[done:min(done+writePiece, len(im.gdt))]
		if err := b.maps.put((im.first+1)*im.blockSize+int64(done), piece); err != nil {
			return err
		}
	}
	s := im.super
	le.PutUint32(s[0xC:], uint32(free))
	if im.descriptor >= 64 {
		le.PutUint32(s[0x158:], uint32(free>>32))
	}
	le.PutUint32(s[0x10:], le.Uint32(s[0x10:])-uint32(b.plan.inodes()))
	le.PutUint32(s[ext4disk.SuperSumAt:], ext4disk.SuperSum(s))
	if err := b.maps.put(ext4disk.SuperOffset, s); err != nil {
		return err
	}
	return b.maps.flush()
}

// inodeMaps marks the inodes in use, group by group. A group with inodes has its
// bitmap of blocks as well, as the kernel sees to in ext4_new_inode.
func (b *builder) inodeMaps() error {
	im := b.im
	end := firstInode + b.plan.inodes() // the first that is free
	for g := int64(0); g*im.inodes+1 < end; g++ {
		from := max(firstInode-1, g*im.inodes) - g*im.inodes
		to := min(end-1, (g+1)*im.inodes) - g*im.inodes
		if to <= from {
			continue
		}
		m, err := im.inodeBitmap(g)
		if err != nil {
			return err
		}
		setBits(m, from, to)
		d := im.group(g)
		d.add(0xE, 0x2E, from-to)
		d.split(uint32(im.inodes-to), 0x1C, 0x32)
		d.clear(groupInodeUninit)
		d.split(im.inodeBitmapSum(m), 0x1A, 0x3A)
		if err := b.maps.put(d.block(0x4)*im.blockSize, m); err != nil {
			return err
		}
		if !d.has(groupBlockUninit) {
			continue
		}
		blocks, err := im.blockBitmap(g)
		if err != nil {
			return err
		}
		if err := im.putBlockBitmap(b.maps, g, blocks, 0); err != nil {
			return err
		}
	}
	return nil
}

func (im *image) inodeBitmap(g int64) ([]byte, error) {
	d := im.group(g)
	m := make([]byte, im.blockSize)
	if d.has(groupInodeUninit) {
		setBits(m, im.inodes, 8*im.blockSize)
		return m, nil
	}
	if _, err := im.f.ReadAt(m, d.block(0x4)*im.blockSize); err != nil {
		return nil, fmt.Errorf("inode bitmap of group %d: %w", g, err)
	}
	return m, nil
}

func (im *image) inodeBitmapSum(m []byte) uint32 { return ext4disk.Sum(im.seed, m[:im.inodes/8]) }
