package ext4fill

import "io"

const writePiece = 1 << 20

// writer puts bytes that lie one behind the other into the image with one write.
type writer struct {
	f   io.WriterAt
	at  int64
	buf []byte
}

func newWriter(f io.WriterAt) *writer { return &writer{f: f, buf: make([]byte, 0, writePiece)} }

func (w *writer) put(at int64, b []byte) error {
	if at != w.at+int64(len(w.buf)) || len(w.buf)+len(b) > cap(w.buf) {
		if err := w.flush(); err != nil {
			return err
		}
		w.at = at
	}
	w.buf = append(w.buf, b...)
	return nil
}

func (w *writer) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	_, err := w.f.WriteAt(w.buf, w.at)
	w.at, w.buf = w.at+int64(len(w.buf)), w.buf[:0]
	return err
}
