// Package archive reads plain tar archives, which are hostile input: Check reads
// one through and refuses whatever breaks a rule, naming the entry and the rule,
// and tells exactly what it holds; Extract writes a checked one below a directory.
//
// Kept as they are: regular files, directories (empty ones too), symbolic links
// with any text, hard links, permission bits with setuid, setgid and sticky,
// numeric owners, modification times to the nanosecond, extended attributes,
// holes, and names of any bytes but "/" and NUL. Blocks of 4 KiB that are zero
// throughout become holes, whether the archive says that they are or not.
//
// A symbolic link is data here: nothing of ours ever follows one, and no entry
// may lie below one. So its text may be absolute, may lead outside or nowhere;
// whoever mounts the volume decides what it means.
package archive
