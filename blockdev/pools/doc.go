// Package pools makes one backend of the pools of a host, so that whoever works
// with images need not know where each of them is.
//
//	home      the first pool: it is there, or the host does not start
//	others    each open, or with the reason why it is not
//
// An image is in the pool that it was placed in (Place) before it was made; one
// that nobody placed is at home. Where an image of another life is, the pools are
// asked. Between pools nothing is shared: a Clone across is errors.ErrUnsupported,
// and the caller copies. What only some pools can (clone, snapshot, sever, count) is asked of
// the image's own, and errors.ErrUnsupported where that cannot.
//
// A pool that is not open keeps nobody else from working: its images answer
// blockdev.ErrUnavailable with the reason.
package pools
