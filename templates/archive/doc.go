// Package archive reads plain tar archives, which are hostile input: Read reads
// one through and refuses whatever breaks a rule, naming the entry and the rule.
// It gives the contents of files to a store and the tree that the entries make.
// Nothing of an archive becomes a name in a file system of ours.
//
// Kept as they are: regular files, directories (empty ones too), symbolic links
// with any text, hard links, permission bits with setuid, setgid and sticky,
// numeric owners, modification times to the nanosecond, extended attributes,
// holes, and names of any bytes but "/" and NUL. Blocks of 4 KiB that are zero
// throughout become holes, whether the archive says that they are or not.
//
// Left out in silence: security.selinux, which is a host's policy, and names of
// users and groups. ACLs are taken as the attributes system.posix_acl_*, and
// refused as text (SCHILY.acl.*), whose names of users mean nothing here.
// Directories that no entry names are 0755, root's, with the newest time of what
// is below them.
//
// A symbolic link is data here: nothing of ours ever follows one, and no entry
// may lie below one. So its text may be absolute, may lead outside or nowhere;
// whoever mounts the volume decides what it means.
package archive
