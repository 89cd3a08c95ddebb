package blockdev

// Limits bound what goes through a device, per second. 0 is no bound.
type Limits struct {
	ReadIOPS   int64 `json:"readIops,omitempty"`
	WriteIOPS  int64 `json:"writeIops,omitempty"`
	ReadBytes  int64 `json:"readBytesPerSecond,omitempty"`
	WriteBytes int64 `json:"writeBytesPerSecond,omitempty"`
}

// None reports whether nothing is bounded.
func (l Limits) None() bool { return l == Limits{} }

// Enforcement is how limits hold on this host.
type Enforcement struct {
	Mechanism string   // in an operator's words
	Gaps      []string // what they do not hold for, in a user's words
}
