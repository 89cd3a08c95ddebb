package nbddevice

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
)

// answering is a server at a socket that greets, reads what the client says, and answers;
// after half a greeting it hangs up.
func answering(t *testing.T, greeting, answer []byte) (socket string, said chan []byte) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	said = make(chan []byte, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if _, err := conn.Write(greeting); err != nil || len(greeting) < 18 {
			return
		}
		b := make([]byte, 4+8+4+4+len("volume"))
		n, _ := io.ReadFull(conn, b)
		said <- b[:n]
		_, _ = conn.Write(answer)
	}()
	return socket, said
}

func greeting(flags uint16) []byte {
	return binary.BigEndian.AppendUint16([]byte("NBDMAGICIHAVEOPT"), flags)
}

func TestHandshake(t *testing.T) {
	socket, said := answering(t, greeting(3), append(binary.BigEndian.AppendUint64(nil, 1<<20), 0x01, 0x6d))
	conn, terms, err := Dial(socket, "volume")
	if err != nil || terms != (Terms{1 << 20, 0x16d}) {
		t.Fatalf("%+v, %v", terms, err)
	}
	conn.Close()
	if got := <-said; string(got) != "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x06volume" {
		t.Errorf("the client says %q", got)
	}
}

// TestHandshakeOfOthers: who is no such server, or hangs up, is an error.
func TestHandshakeOfOthers(t *testing.T) {
	for name, c := range map[string]struct {
		greeting, answer []byte
		want             error
	}{
		"another magic":        {append([]byte("NBDMAGICIHAVEOPX"), 0, 3), nil, errHandshake},
		"zeroes at the end":    {greeting(1), nil, errHandshake},
		"half a greeting":      {greeting(3)[:9], nil, io.ErrUnexpectedEOF},
		"no such export":       {greeting(3), nil, io.EOF},
		"a size that is none":  {greeting(3), []byte{0x80, 0, 0, 0, 0, 0, 0, 0, 0, 1}, errHandshake},
		"half of what it says": {greeting(3), []byte{0, 0, 0}, io.ErrUnexpectedEOF},
	} {
		socket, _ := answering(t, c.greeting, c.answer)
		if _, _, err := Dial(socket, "volume"); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}
