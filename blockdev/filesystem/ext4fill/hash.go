package ext4fill

import "math/bits"

// hasher is the hash of names in a directory's index: half of MD4 over the name
// (lib/ext2fs/dirhash.c, fs/ext4/hash.c). The machine that made the filesystem
// decided whether bytes of names are signed.
type hasher struct {
	seed     [4]uint32
	unsigned bool
}

func (h hasher) sum(text string) (major, minor uint32) {
	s := [4]uint32{0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476}
	if h.seed != [4]uint32{} {
		s = h.seed
	}
	for {
		in := h.words(text)
		halfMD4(&s, &in)
		if len(text) <= 32 {
			break
		}
		text = text[32:]
	}
	major = s[1] &^ 1
	if major == 0xFFFFFFFE { // means the end of the directory
		major = 0xFFFFFFFC
	}
	return major, s[2]
}

// words packs up to 32 bytes of a name, padded with the rest's length.
func (h hasher) words(text string) (in [8]uint32) {
	pad := uint32(len(text)) | uint32(len(text))<<8
	pad |= pad << 16
	if len(text) > 32 {
		text = text[:32]
	}
	n, v := 0, pad
	for i := range len(text) {
		c := uint32(text[i])
		if !h.unsigned {
			c = uint32(int32(int8(text[i])))
		}
		v = c + v<<8
		if i%4 == 3 {
			in[n] = v
			n, v = n+1, pad
		}
	}
	if n < len(in) {
		in[n] = v
		n++
	}
	for ; n < len(in); n++ {
		in[n] = pad
	}
	return in
}

func halfMD4(s *[4]uint32, in *[8]uint32) {
	const k2, k3 = 0x5A827999, 0x6ED9EBA1
	a, b, c, d := s[0], s[1], s[2], s[3]
	f := func(a, b, c, d, x uint32, r int) uint32 { return bits.RotateLeft32(a+(d^(b&(c^d)))+x, r) }
	g := func(a, b, c, d, x uint32, r int) uint32 { return bits.RotateLeft32(a+(b&c)+((b^c)&d)+x+k2, r) }
	h := func(a, b, c, d, x uint32, r int) uint32 { return bits.RotateLeft32(a+(b^c^d)+x+k3, r) }
	for i := 0; i < 8; i += 4 {
		a = f(a, b, c, d, in[i], 3)
		d = f(d, a, b, c, in[i+1], 7)
		c = f(c, d, a, b, in[i+2], 11)
		b = f(b, c, d, a, in[i+3], 19)
	}
	for i := 1; i >= 0; i-- {
		a = g(a, b, c, d, in[i], 3)
		d = g(d, a, b, c, in[i+2], 5)
		c = g(c, d, a, b, in[i+4], 9)
		b = g(b, c, d, a, in[i+6], 13)
	}
	for i := 3; i >= 1; i -= 2 {
		a = h(a, b, c, d, in[i], 3)
		d = h(d, a, b, c, in[i+4], 9)
		c = h(c, d, a, b, in[i-1], 11)
		b = h(b, c, d, a, in[i+3], 15)
	}
	s[0], s[1], s[2], s[3] = s[0]+a, s[1]+b, s[2]+c, s[3]+d
}
