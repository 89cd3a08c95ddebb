package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/blockdev/serve/meter"
)

// transmit serves requests until the connection ends, and closes it.
func (s *Server) transmit(conn net.Conn, t *terms) error {
	if socket, secured := under(conn); socket != nil && t.export.loopable() && !s.options.noLoop {
		if done, err := s.loop(socket, secured, t); done {
			return err
		}
	}
	return s.stream(conn, t)
}

const (
	// streamWorkers bounds how many requests of a connection the device has at once.
	streamWorkers = 32
	// streamFar bounds how many more wait for a base far away: all that is here goes on
	// beside them.
	streamFar = loopSlots - streamWorkers
)

// stream serves a connection by goroutines: one reads requests and hands them to
// workers, which perform and answer them in any order.
type stream struct {
	*terms
	conn    net.Conn
	queue   *meter.Queue
	budget  *budget
	gone    context.Context // ends with the connection
	jobs    chan *job
	workers int // started; only the reader counts
	far     atomic.Int32
	idle    sync.WaitGroup

	writing sync.Mutex
	broken  error // guarded by writing: why replies can no longer be sent
}

// job is a request on its way.
type job struct {
	request
	buf   *buffer // nil when it has no data
	cost  int64   // of the budget
	began int64
}

func (s *Server) stream(conn net.Conn, t *terms) error {
	gone, cancel := context.WithCancel(s.ctx)
	st := &stream{terms: t, conn: conn, queue: t.export.meter.NewQueue(), budget: newBudget(s.options.MaxInFlight), gone: gone, jobs: make(chan *job)}
	defer st.queue.Close()
	stop := context.AfterFunc(s.ctx, func() {
		_ = conn.SetReadDeadline(longAgo)
		_ = conn.SetWriteDeadline(time.Now().Add(endTime))
		st.budget.close()
	})
	defer stop()
	err := st.receive()
	if err != nil && s.ctx.Err() == nil {
		cancel() // nobody is there to wait for a throttled request
	}
	close(st.jobs)
	st.idle.Wait()
	cancel()
	if st.broken != nil {
		err = st.broken
	}
	if err != nil && s.ctx.Err() != nil {
		err = net.ErrClosed
	}
	return errors.Join(err, ignoreClosed(conn.Close()))
}

// receive reads requests until the client is done, gone or wrong.
func (st *stream) receive() error {
	in := bufio.NewReaderSize(st.conn, 32<<10)
	var head [requestSize]byte
	for {
		var r request
		if n, err := io.ReadFull(in, head[:]); err != nil {
			if n == 0 && errors.Is(err, io.EOF) {
				return errHungUp
			}
			return err
		}
		if !r.parse(head[:]) {
			return fmt.Errorf("%w: request magic", errProtocol)
		}
		if r.kind == cmdDisconnect {
			return nil
		}
		if c := st.check(&r); c != codeOK {
			if _, err := io.CopyN(io.Discard, in, r.payload()); err != nil {
				return err
			}
			if err := st.result(&r, c); err != nil {
				return err
			}
			continue
		}
		if err := st.take(in, &r); err != nil {
			return err
		}
	}
}

// take brings a checked request to a worker, with its payload.
func (st *stream) take(in io.Reader, r *request) error {
	j := &job{request: *r, cost: bufferFront}
	if r.hasData() {
		j.cost = bufferCost(int(r.length))
	}
	if !st.budget.take(j.cost) {
		return net.ErrClosed
	}
	j.began = meter.Now()
	if r.hasData() {
		j.buf = takeBuffer(int(r.length))
	}
	if r.kind == cmdWrite {
		if _, err := io.ReadFull(in, j.buf.data(int(r.length))); err != nil {
			return err // the buffer goes to the collector
		}
	}
	if _, counted := kindOf(r); counted {
		st.queue.Begin()
	}
	st.hand(j)
	return nil
}

// hand gives a job to an idle worker, to a new one while there may be more, or waits.
func (st *stream) hand(j *job) {
	select {
	case st.jobs <- j:
		return
	default:
	}
	if st.workers < streamWorkers {
		st.workers++
		st.idle.Go(func() { st.work(j) })
		return
	}
	st.jobs <- j
}

func (st *stream) work(j *job) {
	for ok := true; ok; j, ok = <-st.jobs {
		if !st.handFar(j) {
			st.serve(j)
		}
	}
}

// handFar gives what has to be fetched a goroutine of its own, while there may be more.
func (st *stream) handFar(j *job) bool {
	st.export.gate.RLock()
	fetches := st.fetches(&j.request)
	st.export.gate.RUnlock()
	if !fetches {
		return false
	}
	if st.far.Add(1) > streamFar {
		st.far.Add(-1)
		return false
	}
	st.idle.Go(func() {
		defer st.far.Add(-1)
		st.serve(j)
	})
	return true
}

// serve performs a request and answers it. A reply that cannot be sent ends the
// connection, which the reader notices.
func (st *stream) serve(j *job) {
	var reply []byte
	err := st.wait(j)
	if err == nil {
		reply, err = st.do(j)
	}
	if kind, counted := kindOf(&j.request); counted {
		st.queue.End(kind, j.began, int64(j.length), err != nil)
	}
	if err != nil || reply == nil {
		_ = st.result(&j.request, codeOf(err))
	} else {
		_ = st.send(reply)
	}
	if j.buf != nil {
		j.buf.free()
	}
	st.budget.give(j.cost)
}

// do performs a request, and gives its reply if that has data.
func (st *stream) do(j *job) ([]byte, error) {
	st.export.gate.RLock()
	defer st.export.gate.RUnlock()
	if j.kind == cmdBlockStatus {
		return st.blockStatus(&j.request)
	}
	var data []byte
	if j.buf != nil {
		data = j.buf.data(int(j.length))
	}
	err := st.perform(st.queue, &j.request, data)
	if err != nil || j.kind != cmdRead {
		return nil, err
	}
	return st.putReadHeader(j.buf, &j.request), nil
}

// wait keeps a throttled request back, while the client is there.
func (st *stream) wait(j *job) error {
	changed := *st.export.changed.Load() // before the limits are looked at: none is missed
	ns := st.throttle(&j.request)
	if ns == 0 {
		return nil
	}
	began := meter.Now()
	st.queue.Wait(meter.Throttle)
	defer st.queue.Waited(meter.Throttle, began)
	timer := time.NewTimer(time.Duration(ns))
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			return nil
		case <-changed:
			changed = *st.export.changed.Load()
			if ns = st.throttle(&j.request); ns == 0 {
				return nil // it was let go, and is not taken once more from a change that comes now
			}
			timer.Reset(time.Duration(ns))
		case <-st.gone.Done():
			return st.gone.Err()
		}
	}
}

// result answers without data.
func (st *stream) result(r *request, c code) error {
	var b [failureSize]byte
	return st.send(b[:st.putResult(b[:], r, c)])
}

// send writes one reply. Once one failed, or was sent in part, none follows.
func (st *stream) send(b []byte) error {
	st.writing.Lock()
	defer st.writing.Unlock()
	if st.broken != nil {
		return st.broken
	}
	if _, err := st.conn.Write(b); err != nil {
		st.broken = err
		_ = st.conn.SetReadDeadline(longAgo)
		st.budget.close()
	}
	return st.broken
}
