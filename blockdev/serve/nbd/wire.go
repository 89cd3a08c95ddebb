package nbd

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"syscall"
)

// Magic numbers.
const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicReply      = 0x0003e889045565a9 // to an option
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698 // reply
	magicStructured = 0x668e33ef // reply
)

// Flags of the handshake, both ways.
const (
	handshakeFixed   = 1 << 0
	handshakeNoZeros = 1 << 1
)

// Options.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
)

// Replies to options.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrUnsup   = 1<<31 + 1
	repErrPolicy  = 1<<31 + 2
	repErrInvalid = 1<<31 + 3
	repErrTLSReqd = 1<<31 + 5
	repErrUnknown = 1<<31 + 6
	repErrTooBig  = 1<<31 + 9
)

// What GO and INFO tell.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Flags of an export.
const (
	exportHasFlags    = 1 << 0
	exportReadOnly    = 1 << 1
	exportFlush       = 1 << 2
	exportFUA         = 1 << 3
	exportTrim        = 1 << 5
	exportWriteZeroes = 1 << 6
	exportDF          = 1 << 7
	exportMultiConn   = 1 << 8
	exportFastZero    = 1 << 11
)

// command is the type of a request.
type command uint16

const (
	cmdRead        command = 0
	cmdWrite       command = 1
	cmdDisconnect  command = 2
	cmdFlush       command = 3
	cmdTrim        command = 4
	cmdWriteZeroes command = 6
	cmdBlockStatus command = 7
)

// Flags of a request.
const (
	flagFUA      = 1 << 0
	flagNoHole   = 1 << 1
	flagDF       = 1 << 2
	flagReqOne   = 1 << 3
	flagFastZero = 1 << 4
)

// Structured replies.
const (
	chunkDone        = 1 << 0 // flag
	chunkNone        = 0
	chunkOffsetData  = 1
	chunkBlockStatus = 5
	chunkError       = 1<<15 + 1
)

// base:allocation.
const (
	contextAllocation   = "base:allocation"
	contextAllocationID = 1
	stateHole           = 1 << 0
	stateZero           = 1 << 1
)

// Sizes of messages in bytes.
const (
	requestSize         = 28
	simpleSize          = 16
	chunkSize           = 20
	dataChunkSize       = chunkSize + 8
	optionSize          = 16
	maxString           = 4096     // "a string SHOULD NOT be longer"
	maxOption     int64 = 64 << 10 // no option that we know needs more
	maxPayload          = 32 << 20 // of one read or write: the protocol's default
)

// code is an error as clients know it.
type code uint32

const (
	codeOK       code = 0
	codePerm     code = 1
	codeIO       code = 5
	codeNoMemory code = 12
	codeInvalid  code = 22
	codeNoSpace  code = 28
	codeNotSup   code = 95
)

// codeOf reads an error of a device.
func codeOf(err error) code {
	if err == nil {
		return codeOK
	}
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return codeNoSpace
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return codePerm
	case errors.Is(err, syscall.ENOMEM):
		return codeNoMemory
	case errors.Is(err, errors.ErrUnsupported):
		return codeNotSup
	default:
		return codeIO
	}
}

func putSimple(b []byte, cookie uint64, c code) {
	binary.BigEndian.PutUint32(b, magicSimple)
	binary.BigEndian.PutUint32(b[4:], uint32(c))
	binary.BigEndian.PutUint64(b[8:], cookie)
}

func putChunk(b []byte, flags, kind uint16, cookie uint64, length uint32) {
	binary.BigEndian.PutUint32(b, magicStructured)
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], kind)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint32(b[16:], length)
}
