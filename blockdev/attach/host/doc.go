// Package host attaches volumes to directories of this host: target {type:
// "host", path}, below one of a few prefixes that the operator allows.
//
// Everything below a prefix may be in the hands of tenants, so paths are walked
// from the prefix by descriptor and follow no symbolic link. A directory that is
// missing is made; it stays after detach, because who else uses it by then is
// not known. A host has no end: after a reboot the volume is missing there, and
// the engine attaches it again.
package host
