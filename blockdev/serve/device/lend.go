package device

import "holdfast/blockdev/serve/overlay"

// Lender is something served whose files a server may use directly.
type Lender interface {
	// Begin gives the file in which a range may be read at the device's own offsets,
	// until End is called; false where ReadAt is the way. It never waits.
	Begin(off, length int64) (data overlay.File, ok bool)
	// End ends what Begin has begun.
	End()
	// BeginWrite is Begin for a write, until EndWrite is called with what it gave, and
	// whether all was written.
	BeginWrite(off, length int64) (data overlay.File, first, ok bool)
	EndWrite(off, length int64, first, wrote bool)
}

// Fetcher is something served that has some of its bytes far away.
type Fetcher interface {
	// Absent tells whether some of a range would have to be fetched to be read. It
	// never waits; while the stack changes it says no.
	Absent(off, length int64) bool
	// Fetches tells whether a read of a range, or a write, which keeps the rest of
	// blocks that it writes in part, would have to fetch something. It waits while the
	// stack changes, and never for what is far away.
	Fetches(write bool, off, length int64) bool
}

var (
	_ Lender  = (*overlay.Overlay)(nil)
	_ Fetcher = (*overlay.Overlay)(nil)
)
