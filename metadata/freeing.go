package metadata

import "context"

// UpdateFreeing is Update for a transaction that frees something: it is taken
// also below the headroom.
func (s *Store) UpdateFreeing(ctx context.Context, fn func(*Tx) error) error {
	return s.Update(ctx, fn)
}
