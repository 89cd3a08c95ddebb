// Package loop makes block devices of files with the kernel's loop driver.
//
// A loop device is known by its backing file, that is by device and inode,
// never by its number or its backing file's name: numbers belong to the whole
// host and change hands, names are cut and go stale. Every function that changes
// a device verifies first that it still belongs to the file that is meant.
//
// Nothing in the kernel keeps two loop devices from one file, so callers hold a
// lock of their own while they look for a device and make one.
package loop
