// Package ext4disk is what all who read or write ext4's structures share: where
// they are and how they are summed. Sources: the kernel's
// Documentation/filesystems/ext4 and fs/ext4/super.c.
package ext4disk
