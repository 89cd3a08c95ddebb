package vmtest

import (
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/guest"
)

// Options say what a guest is to be like.
type Options = guest.Options

// VM is a guest that ends with its test.
type VM struct{ *guest.VM }

// Start gives a running guest; the test's end ends it.
func Start(t testing.TB, o Options) *VM {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.VM)
	v, err := guest.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the guest's console ends:\n%s", v.Console())
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	return &VM{v}
}

// Sh runs a line of shell in the guest and fails the test if it fails.
func (v *VM) Sh(t testing.TB, line string) string {
	t.Helper()
	text, err := v.Output(t.Context(), "sh", "-c", line)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
