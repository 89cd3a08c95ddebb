package envelope

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"holdfast/blockdev"
)

func sealed(t testing.TB, of, payload string) []byte {
	t.Helper()
	b, err := Seal(of, []byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestEnvelope(t *testing.T) {
	for _, payload := range []string{"", "x", "\n", `{"a": 1}`, "\x00\xff\n\n", strings.Repeat("y", MaxPayload)} {
		got, err := Unseal("vol-x", sealed(t, "vol-x", payload))
		if err != nil || string(got) != payload {
			t.Errorf("%.20q came back as %.20q, %v", payload, got, err)
		}
	}
	if _, err := Seal("vol-x", make([]byte, MaxPayload+1)); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("too long: %v", err)
	}
}

func TestEnvelopeNoticesDamage(t *testing.T) {
	good := sealed(t, "vol-x", `{"name": "a volume"}`)
	for i := range good {
		for bit := range 8 {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << bit
			if _, err := Unseal("vol-x", bad); !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatalf("bit %d of byte %d flipped: %v", bit, i, err)
			}
		}
		if _, err := Unseal("vol-x", good[:i]); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
	for what, bad := range map[string][]byte{
		"another image's": sealed(t, "vol-y", "x"),
		"longer":          append(bytes.Clone(good), '\n'),
		"zeroes":          make([]byte, len(good)),
		"no header":       []byte("\n\n"),
		"a later version": bytes.Replace(good, []byte(`"version":1`), []byte(`"version":2`), 1),
	} {
		if _, err := Unseal("vol-x", bad); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzUnseal(f *testing.F) {
	f.Add([]byte(nil))
	f.Add([]byte("{}\n\n"))
	f.Add(sealed(f, "vol-x", ""))
	f.Add(sealed(f, "vol-x", `{"name": "a volume"}`))
	f.Add(bytes.Replace(sealed(f, "vol-x", "x"), []byte(`"length":1`), []byte(`"length":-1`), 1))
	f.Add(bytes.Replace(sealed(f, "vol-x", "x"), []byte(`"length":1`), []byte(`"length":9223372036854775807`), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		payload, err := Unseal("vol-x", b)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatalf("%v", err)
			}
			return
		}
		// What is accepted is exactly what seal makes.
		if again, err := Seal("vol-x", payload); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%q is accepted as %q", b, payload)
		}
	})
}
