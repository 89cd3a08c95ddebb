package sys

import (
	"errors"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Flags of io_uring_setup and io_uring_enter, linux/io_uring.h.
const (
	uringSetupCQSize       = 1 << 3
	uringSetupSubmitAll    = 1 << 7
	uringSetupSingleIssuer = 1 << 12
	uringSetupDeferTaskrun = 1 << 13

	uringEnterGetEvents = 1 << 0
	uringEnterExtArg    = 1 << 3

	uringOffSQRing = 0
	uringOffSQEs   = 0x10000000

	uringFeatSingleMmap = 1 << 0
	uringFeatNoDrop     = 1 << 1
	uringFeatExtArg     = 1 << 8  // waits that end by themselves
	uringFeatRsrcTags   = 1 << 10 // of the kernel that first had polls that last
	uringFeatCQESkip    = 1 << 11 // 5.17
	uringFeatures       = uringFeatSingleMmap | uringFeatNoDrop | uringFeatExtArg | uringFeatRsrcTags
)

// uringSetups are what to ask a kernel for, the best first: an older one refuses what
// it does not know (6.1, 5.18).
var uringSetups = []uint32{
	uringSetupCQSize | uringSetupSubmitAll | uringSetupSingleIssuer | uringSetupDeferTaskrun,
	uringSetupCQSize | uringSetupSubmitAll,
	uringSetupCQSize,
}

// UringEntry is one submission: struct io_uring_sqe.
type UringEntry struct {
	Opcode   uint8
	Flags    uint8
	IOPrio   uint16
	FD       int32
	Off      uint64
	Addr     uint64
	Len      uint32
	OpFlags  uint32
	UserData uint64
	_        [3]uint64
}

// UringEvent is one completion: struct io_uring_cqe.
type UringEvent struct {
	UserData uint64
	Res      int32
	Flags    uint32
}

// uringParams is struct io_uring_params.
type uringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFD uint32
	resv                                                                   [3]uint32
	sq                                                                     struct{ head, tail, ringMask, ringEntries, flags, dropped, array, resv1, _, _ uint32 }
	cq                                                                     struct{ head, tail, ringMask, ringEntries, overflow, cqes, flags, resv1, _, _ uint32 }
}

// Uring is an io_uring with its queues in memory. It belongs to the thread that
// made it: no other may call its methods.
type Uring struct {
	fd            int
	rings, sqeMem []byte
	entries       []UringEntry
	sqTail        *uint32
	sqHead        *uint32
	tail          uint32 // ours; published by Enter
	cqHead        *uint32
	cqTail        *uint32
	cqMask        uint32
	events        []UringEvent
	most          uringWait
	quiet         bool
	keeps         bool
}

// uringWait is struct io_uring_getevents_arg, and the time that it points to.
type uringWait struct {
	sigmask              uint64
	sigmaskSize, minWait uint32
	ts                   uint64
	spec                 unix.Timespec
}

// NewUring makes a ring for so many submissions, a power of two, and twice as many
// completions at once, used by the calling thread only (the goroutine is locked to
// it). errors.ErrUnsupported where the kernel has none that is new enough (5.13) or
// forbids it.
func NewUring(entries uint32) (*Uring, error) { return newUring(entries, uringSetups) }

func newUring(entries uint32, setups []uint32) (*Uring, error) {
	var p uringParams
	var fd uintptr
	errno := unix.EINVAL
	for n := 0; n < len(setups) && errno == unix.EINVAL; n++ {
		p = uringParams{flags: setups[n], cqEntries: 2 * entries}
		fd, _, errno = unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(&p)), 0)
	}
	if errno != 0 {
		err := os.NewSyscallError("io_uring_setup", errno)
		if errno == unix.ENOSYS || errno == unix.EINVAL || errno == unix.EPERM {
			err = errors.Join(errors.ErrUnsupported, err)
		}
		return nil, err
	}
	r := &Uring{fd: int(fd), quiet: p.features&uringFeatCQESkip != 0}
	unix.CloseOnExec(r.fd)
	if p.features&uringFeatures != uringFeatures {
		return nil, errors.Join(errors.ErrUnsupported, errors.New("io_uring lacks features"), r.Close())
	}
	if err := r.mapQueues(&p); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Uring) mapQueues(p *uringParams) (err error) {
	size := max(p.sq.array+p.sqEntries*4, p.cq.cqes+p.cqEntries*uint32(unsafe.Sizeof(UringEvent{})))
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if r.rings, err = unix.Mmap(r.fd, uringOffSQRing, int(size), prot, flags); err != nil {
		return os.NewSyscallError("mmap", err)
	}
	if r.sqeMem, err = unix.Mmap(r.fd, uringOffSQEs, int(p.sqEntries)*int(unsafe.Sizeof(UringEntry{})), prot, flags); err != nil {
		return os.NewSyscallError("mmap", err)
	}
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[off])) }
	r.entries = unsafe.Slice((*UringEntry)(unsafe.Pointer(&r.sqeMem[0])), p.sqEntries)
	r.sqHead, r.sqTail = word(p.sq.head), word(p.sq.tail)
	r.cqHead, r.cqTail, r.cqMask = word(p.cq.head), word(p.cq.tail), *word(p.cq.ringMask)
	r.events = unsafe.Slice((*UringEvent)(unsafe.Pointer(&r.rings[p.cq.cqes])), p.cqEntries)
	r.tail = atomic.LoadUint32(r.sqTail)
	// Entry n always stands at place n: the array in between is filled once.
	array := unsafe.Slice(word(p.sq.array), p.sqEntries)
	for n := range array {
		array[n] = uint32(n)
	}
	return nil
}

// Close frees the ring. Operations that are not complete are canceled by the
// kernel in the background: memory of theirs must stay valid, so complete them
// first.
func (r *Uring) Close() error {
	var errs []error
	for _, m := range [][]byte{r.sqeMem, r.rings} {
		if m != nil {
			errs = append(errs, os.NewSyscallError("munmap", unix.Munmap(m)))
		}
	}
	return errors.Join(append(errs, os.NewSyscallError("close", unix.Close(r.fd)))...)
}

// Next gives an empty entry to fill, which the next Enter submits; nil when as many
// as the ring has wait for that.
func (r *Uring) Next() *UringEntry {
	if r.tail-atomic.LoadUint32(r.sqHead) == uint32(len(r.entries)) {
		return nil
	}
	e := &r.entries[r.tail&uint32(len(r.entries)-1)]
	*e = UringEntry{}
	r.tail++
	return e
}

// Enter submits what was filled and waits until at least so many completions are
// there. A signal may end the wait early.
func (r *Uring) Enter(wait uint32) error { return r.enter(wait, uringEnterGetEvents, nil, 0) }

// EnterWithin is Enter that waits no longer than some time.
func (r *Uring) EnterWithin(wait uint32, most time.Duration) error {
	r.most.spec = unix.NsecToTimespec(int64(most))
	r.most.ts = uint64(uintptr(unsafe.Pointer(&r.most.spec)))
	return r.enter(wait, uringEnterGetEvents|uringEnterExtArg, unsafe.Pointer(&r.most), unsafe.Offsetof(r.most.spec))
}

// Submit submits what was filled, and looks for no completions.
func (r *Uring) Submit() error { return r.enter(0, 0, nil, 0) }

// Filled is how many entries wait to be submitted.
func (r *Uring) Filled() int { return int(r.tail - atomic.LoadUint32(r.sqHead)) }

// KeepProcessor has the entries that follow keep their processor (Go's P) for as long as
// they wait, or no longer so. Otherwise the scheduler is told of each wait: it takes the
// processor away from a goroutine that has not been scheduled anew for 10 ms, which a
// loop never is, and on the way out another one has to be found, and the scheduler's
// watching thread to be woken. To keep it is for waits that end soon by themselves, and
// while others have processors left. Whoever stops the world interrupts the wait by a
// signal.
func (r *Uring) KeepProcessor(keep bool) { r.keeps = keep }

func (r *Uring) enter(wait uint32, flags uintptr, arg unsafe.Pointer, size uintptr) error {
	submit := uintptr(r.Filled())
	atomic.StoreUint32(r.sqTail, r.tail)
	call := unix.Syscall6
	if r.keeps {
		call = unix.RawSyscall6
	}
	_, _, errno := call(unix.SYS_IO_URING_ENTER, uintptr(r.fd), submit, uintptr(wait), flags, uintptr(arg), size)
	switch errno {
	case 0, unix.EINTR, unix.ETIME, unix.EAGAIN, unix.EBUSY: // the last two: what is left is submitted next time
		return nil
	default:
		return os.NewSyscallError("io_uring_enter", errno)
	}
}

// Quiet tells whether entries may say that only their failure is to complete.
func (r *Uring) Quiet() bool { return r.quiet }

// Submitted tells whether the kernel has taken all that was filled, which Enter cannot
// promise.
func (r *Uring) Submitted() bool { return r.Filled() == 0 }

// Event takes the oldest completion; false when there is none.
func (r *Uring) Event() (e UringEvent, ok bool) {
	head := *r.cqHead // only we write it
	if head == atomic.LoadUint32(r.cqTail) {
		return e, false
	}
	e = r.events[head&r.cqMask]
	atomic.StoreUint32(r.cqHead, head+1)
	return e, true
}

// NewEventFD makes an eventfd for waking who waits in a ring.
func NewEventFD() (*os.File, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return os.NewFile(uintptr(fd), "eventfd"), nil
}
