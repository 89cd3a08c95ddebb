package sys_test

import (
	"testing"

	"holdfast/internal/sys"
)

// TestUnload: a program that has let its pages go goes on.
func TestUnload(t *testing.T) {
	p, err := sys.OwnProgram()
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := p.Unload(); err != nil {
			t.Fatal(err)
		}
	}
}
