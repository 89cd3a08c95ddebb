package nbd

import (
	"encoding/binary"
	"math"
)

// request is one that a client made, as it stands on the wire.
type request struct {
	flags  uint16
	kind   command
	cookie uint64
	offset uint64
	length uint32
}

// parse reads the requestSize bytes of a request. It is not one when the magic is
// wrong: then nobody knows where the next begins.
func (r *request) parse(b []byte) bool {
	if binary.BigEndian.Uint32(b) != magicRequest {
		return false
	}
	r.flags = binary.BigEndian.Uint16(b[4:])
	r.kind = command(binary.BigEndian.Uint16(b[6:]))
	r.cookie = binary.BigEndian.Uint64(b[8:])
	r.offset = binary.BigEndian.Uint64(b[16:])
	r.length = binary.BigEndian.Uint32(b[24:])
	return true
}

// payload is how many bytes follow the request, whatever becomes of it.
func (r *request) payload() int64 {
	if r.kind == cmdWrite {
		return int64(r.length)
	}
	return 0
}

// hasData tells whether a request that is performed has data to read or write.
func (r *request) hasData() bool { return r.kind == cmdRead || r.kind == cmdWrite }

// terms are what a connection agreed on.
type terms struct {
	export     *Export
	size       int64 // of the export when it was agreed on: what the client was told
	block      int64
	readOnly   bool
	structured bool
	allocation bool // base:allocation was asked for
}

// check gives the error of a request that may not be performed.
func (t *terms) check(r *request) code {
	if r.flags&^t.allowed(r.kind) != 0 {
		return codeInvalid
	}
	switch r.kind {
	case cmdFlush:
		if r.offset != 0 || r.length != 0 {
			return codeInvalid
		}
		return codeOK
	case cmdRead:
		if r.length > maxPayload {
			return codeInvalid
		}
		return t.within(r, codeInvalid)
	case cmdBlockStatus:
		if !t.allocation {
			return codeInvalid
		}
		return t.within(r, codeInvalid)
	case cmdWrite, cmdTrim, cmdWriteZeroes:
		if t.readOnly {
			return codePerm
		}
		if r.kind == cmdWrite && r.length > maxPayload {
			return codeInvalid
		}
		if r.kind == cmdTrim {
			return t.within(r, codeInvalid)
		}
		return t.within(r, codeNoSpace)
	default:
		return codeInvalid
	}
}

// within checks the range, and gives the error for what is past the end.
func (t *terms) within(r *request, past code) code {
	if r.length == 0 {
		return codeInvalid
	}
	// By the size that it has now: a client may learn of it in another way, as the
	// kernel's does.
	if r.offset > math.MaxInt64 || int64(r.offset) > t.export.size.Load()-int64(r.length) {
		return past
	}
	if int64(r.offset)%t.block != 0 || int64(r.length)%t.block != 0 {
		return codeInvalid
	}
	return codeOK
}

// allowed are the flags that a request may have. Some clients set FUA on requests
// that write nothing; the protocol lets them.
func (t *terms) allowed(kind command) uint16 {
	switch kind {
	case cmdRead:
		if t.structured {
			return flagFUA | flagDF
		}
		return flagFUA
	case cmdWriteZeroes:
		return flagFUA | flagNoHole | flagFastZero
	case cmdBlockStatus:
		return flagFUA | flagReqOne
	default:
		return flagFUA
	}
}
