// Package ext4fill writes a file tree (package tree) into an empty ext4 image: in
// Go, without a mount and without a tool that sees the tree. Package filesystem
// makes the empty filesystem; what is written into it depends on that filesystem
// and the tree alone, so that equal trees make equal images.
//
//	l, err := ext4fill.Need(ctx, t, blockSize)    // blocks and inodes
//	...                                           // make an image of that size
//	kept, err := ext4fill.Fill(ctx, image, t, ext4fill.Files{store})
//	...                                           // flush and publish
//
// Contents lie at the front in the order of the tree, one file behind the other,
// interrupted only by what mkfs has placed; what the filesystem itself keeps about
// the tree (directories, extent trees, extended attributes, long symbolic links)
// follows together. So contents that a store has in the order of the tree are a
// few large pieces, which a pool with reflink shares instead of copying. Bitmaps
// and inode tables stay holes where nothing is in use.
//
// With blocks of 1 KiB (images below 16 MiB) runs in the image begin at multiples
// of 1 KiB, not of tree.Block, and contents are copied.
//
// The format is that of the kernel's Documentation/filesystems/ext4 and
// fs/ext4/*.h, with lib/ext2fs and e2fsck of e2fsprogs as the judges.
package ext4fill
