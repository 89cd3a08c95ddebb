// Package sanitize copies the files of a filesystem that a guest may have written into
// a fresh one: what is read is read by code of ours (package filesystem), what is
// written is written by code of ours (package ext4fill) into an ext4 that was just
// made. Nothing is mounted and no tool sees the old bytes; so the new image is as
// trustworthy as one that is made of an archive.
//
// Whole blocks of contents are shared with the old image where the pool can, else
// copied. Holes, hard links, owners, modes, times and symbolic links are kept;
// extended attributes and ACLs as far as filesystem.ReadTree reads them. Devices,
// pipes and sockets are not.
package sanitize
