// Package filesystem makes, identifies, checks, grows and reads the filesystems
// that Holdfast puts on images: ext4, XFS and btrfs. Paths are image files or
// block devices that the caller opened; no tenant string is ever an argument of
// a tool. What superblocks, directories and files can tell is read
// from the image itself, without a tool, and nothing there is trusted.
package filesystem
