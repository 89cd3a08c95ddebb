package lvm

// fault stands, in tests, around everything that the backend does to the world,
// and around its questions: it may leave it undone, or tell of a failure after it.
// The name begins with "ask" for what changes nothing.
type fault func(name string, do func() error) error

func (f fault) effect(name string, do func() error) error {
	if f == nil {
		return do()
	}
	return f(name, do)
}
