package archive

import "fmt"

// Packing is a fault of how an archive is packed: ErrRefused is in its chain, and
// nothing of its cause. An io.ErrUnexpectedEOF in there would be taken for the
// archive's own end.
type Packing struct{ error }

// Unwrap gives ErrRefused.
func (Packing) Unwrap() error { return ErrRefused }

// Refuse refuses what an archive is packed in, with the reason.
func Refuse(format string, args ...any) error { return Packing{fmt.Errorf(format, args...)} }

// RefuseEntry refuses it for one of its entries.
func RefuseEntry(name, format string, args ...any) error {
	return Refuse("entry %s: %w", Quote(name), fmt.Errorf(format, args...))
}

// Quote shows a tenant's text in a message: escaped, and not too long.
func Quote(s string) string {
	if len(s) > 120 {
		return fmt.Sprintf("%q...", s[:120])
	}
	return fmt.Sprintf("%q", s)
}
