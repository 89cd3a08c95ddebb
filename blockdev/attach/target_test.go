package attach_test

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev/attach"
)

// TestStray: every field that a caller can set is named, unless it is known.
func TestStray(t *testing.T) {
	ours := []string{"type", "shared", "pid", "startTime", "boot"} // not taken from a caller, or always there
	for i := range reflect.TypeFor[attach.Target]().NumField() {
		name, _, _ := strings.Cut(reflect.TypeFor[attach.Target]().Field(i).Tag.Get("json"), ",")
		target := attach.Target{Type: "host"}
		switch field := reflect.ValueOf(&target).Elem().Field(i); field.Kind() {
		case reflect.String:
			field.SetString("x")
		case reflect.Bool:
			field.SetBool(true)
		case reflect.Int:
			field.SetInt(1)
		case reflect.Uint64:
			field.SetUint(1)
		default:
			t.Fatalf("field %s is a %s", name, field.Kind())
		}
		want := name
		if slices.Contains(ours, name) {
			want = ""
		}
		if got := target.Stray("other"); got != want {
			t.Errorf("with %s set, %q is stray", name, got)
		}
		if got := target.Stray(name); got != "" {
			t.Errorf("%s is known, and %q is stray", name, got)
		}
	}
}
