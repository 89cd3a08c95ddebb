// Package filecopy copies a file tree that a tenant has shaped from one mounted
// filesystem into another: through the kernel alone, by descriptors, one name at a
// time and following no link, so that nothing in the tree can lead it elsewhere.
//
// It is code of ours and no cp in a cage, because a user namespace may not set all
// that a tree can have: trusted.* attributes, and owners that it does not map. What
// is run here has no parser of the tree's bytes; names, attributes and contents are
// handed on as they are.
package filecopy
