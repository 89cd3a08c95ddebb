package uring

import (
	"syscall"
	"unsafe"

	"holdfast/internal/sys"
)

// Opcodes and flags of what a file or an eventfd is asked for, linux/io_uring.h.
const (
	opReadv     = 1
	opWritev    = 2
	opFsync     = 3
	opPollAdd   = 6
	opFallocate = 17

	fsyncData    = 1 << 0
	pollMulti    = 1 << 0
	pollIn       = 1
	eventMore    = 1 << 1 // IORING_CQE_F_MORE
	fallocKeep   = 1 << 0 // linux/falloc.h
	fallocPunch  = 1 << 1
	fallocZeroes = 1 << 4
)

// ReadPieces reads into several pieces of memory; they and the slice stay untouched
// until the completion is there.
func ReadPieces(e *sys.UringEntry, fd int, to []syscall.Iovec, at int64, tag uint64) {
	pieces(e, opReadv, fd, to, at, tag)
}

// WritePieces writes several pieces of memory, like ReadPieces.
func WritePieces(e *sys.UringEntry, fd int, from []syscall.Iovec, at int64, tag uint64) {
	pieces(e, opWritev, fd, from, at, tag)
}

func pieces(e *sys.UringEntry, opcode uint8, fd int, v []syscall.Iovec, at int64, tag uint64) {
	e.Opcode, e.FD, e.UserData = opcode, int32(fd), tag
	e.Addr, e.Len, e.Off = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(v)))), uint32(len(v)), uint64(at)
}

// SyncData is fdatasync.
func SyncData(e *sys.UringEntry, fd int, tag uint64) {
	e.Opcode, e.FD, e.UserData, e.OpFlags = opFsync, int32(fd), tag, fsyncData
}

// Punch makes a hole of a range of a file, which stays as long as it is.
func Punch(e *sys.UringEntry, fd int, at, length int64, tag uint64) {
	fallocate(e, fd, fallocKeep|fallocPunch, at, length, tag)
}

// Zero makes a range of a file read as zero and keeps its space.
func Zero(e *sys.UringEntry, fd int, at, length int64, tag uint64) {
	fallocate(e, fd, fallocKeep|fallocZeroes, at, length, tag)
}

func fallocate(e *sys.UringEntry, fd int, mode uint32, at, length int64, tag uint64) {
	e.Opcode, e.FD, e.UserData = opFallocate, int32(fd), tag
	e.Off, e.Addr, e.Len = uint64(at), uint64(length), mode
}

// Watch completes each time that fd becomes readable, until it fails; nothing is
// read, and the descriptor's mode does not matter. See Lasts.
func Watch(e *sys.UringEntry, fd int, tag uint64) {
	e.Opcode, e.FD, e.UserData = opPollAdd, int32(fd), tag
	e.Len, e.OpFlags = pollMulti, pollIn
}

// Lasts tells of a completion of Watch that more will follow.
func Lasts(e sys.UringEvent) bool { return e.Flags&eventMore != 0 }
