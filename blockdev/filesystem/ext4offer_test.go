package filesystem

import (
	"testing"

	"holdfast/blockdev/blockdevtest"
)

func TestOfferExt4IsWhatMakeMakes(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Ext4)
	x := NewTools()
	sizes := []int64{MiB, 2 * MiB, 8 * MiB, 8*MiB + 1024, 8*MiB + 100*1024, 9 * MiB, 15 * MiB, 16 * MiB, 17 * MiB, 64 * MiB, 127 * MiB, 128 * MiB, 129 * MiB, 131 * MiB,
		255 * MiB, 256 * MiB, 300 * MiB, 512 * MiB, 1000 * MiB, 1 << 30, 1<<30 + 4096, 3 << 30, 10 << 30, 17 << 30, 100 << 30, 1 << 40}
	for _, size := range sizes {
		for _, inodes := range []int64{0, 1, 1000, size / 2000, size / 1000} {
			path := blank(t, size)
			offer := OfferExt4(size, inodes)
			if err := x.Make(t.Context(), path, Ext4, MakeOptions{Inodes: inodes}); err != nil {
				if offer.Blocks > 0 {
					t.Errorf("%d bytes, %d inodes: offers %d blocks: %v", size, inodes, offer.Blocks, err)
				}
				continue
			}
			s, err := readExt4Super(path)
			check(t, err)
			have := Ext4Offer{BlockSize: s.blockSize, Blocks: s.freeBlocks, Inodes: s.freeInodes}
			if offer != have {
				t.Errorf("%d bytes, %d inodes: %+v, mke2fs makes %+v (difference %d)", size, inodes, offer, have, have.Blocks-offer.Blocks)
			}
			if offer.Inodes < inodes {
				t.Errorf("%d bytes: %d inodes of %d", size, offer.Inodes, inodes)
			}
		}
	}
}

// TestSignExt4Names plays a machine where char is unsigned.
func TestSignExt4Names(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Ext4)
	path := blank(t, 16*MiB)
	check(t, NewTools().Make(t.Context(), path, Ext4, MakeOptions{UUID: "8d5a5c0b-6c3c-4f3c-9d0a-1f2e3d4c5b6a"}))
	here, err := readExt4Super(path)
	check(t, err)
	command(t, "debugfs", "-w", "-R", "set_super_value flags 2", path)
	check(t, signExt4Names(path))
	there, err := readExt4Super(path)
	check(t, err)
	if here.raw[ext4FlagsAt] != ext4FlagSigned || there.raw[ext4FlagsAt] != ext4FlagSigned {
		t.Errorf("flags %#x and %#x", here.raw[ext4FlagsAt], there.raw[ext4FlagsAt])
	}
	check(t, NewTools().Check(t.Context(), path, Ext4, false))
}
