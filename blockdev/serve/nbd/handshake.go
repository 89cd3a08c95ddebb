package nbd

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

// errProtocol is what a client did against the protocol: its connection ends.
var errProtocol = errors.New("protocol error")

// errLeft is a client that ended the handshake as it may.
var errLeft = errors.New("the client left")

// handshake is a connection in its first phase. Nothing is read ahead: what follows
// STARTTLS in the clear is never taken for what the client sent encrypted.
type handshake struct {
	server     *Server
	conn       net.Conn // replaced by STARTTLS
	encrypted  bool
	tlsNeeded  bool
	noZeros    bool
	structured bool
	allocation *string // the export that base:allocation was set for
	reply      []byte  // of one option, sent in one piece
}

// negotiate goes through the handshake. The connection that it gives is to be used
// from then on, also after an error.
func (s *Server) negotiate(conn net.Conn, tlsNeeded bool) (net.Conn, *terms, error) {
	h := &handshake{server: s, conn: conn, tlsNeeded: tlsNeeded}
	t, err := h.run()
	return h.conn, t, err
}

func (h *handshake) run() (*terms, error) {
	var hello [18]byte
	binary.BigEndian.PutUint64(hello[:], magicInit)
	binary.BigEndian.PutUint64(hello[8:], magicOption)
	binary.BigEndian.PutUint16(hello[16:], handshakeFixed|handshakeNoZeros)
	if _, err := h.conn.Write(hello[:]); err != nil {
		return nil, err
	}
	var flags [4]byte
	if _, err := io.ReadFull(h.conn, flags[:]); err != nil {
		return nil, err
	}
	f := binary.BigEndian.Uint32(flags[:])
	if f&^(handshakeFixed|handshakeNoZeros) != 0 {
		return nil, fmt.Errorf("%w: client flags %#x", errProtocol, f)
	}
	h.noZeros = f&handshakeNoZeros != 0
	for {
		if t, err := h.option(); t != nil || err != nil {
			return t, err
		}
	}
}

// option reads one and answers it. It gives terms when the handshake is over.
func (h *handshake) option() (*terms, error) {
	var head [optionSize]byte
	if _, err := io.ReadFull(h.conn, head[:]); err != nil {
		return nil, err
	}
	if magic := binary.BigEndian.Uint64(head[:]); magic != magicOption {
		return nil, fmt.Errorf("%w: option magic %#x", errProtocol, magic)
	}
	opt, length := binary.BigEndian.Uint32(head[8:]), int64(binary.BigEndian.Uint32(head[12:]))
	h.reply = h.reply[:0]
	if length > maxOption {
		if opt == optExportName {
			return nil, fmt.Errorf("%w: an export name of %d bytes", errProtocol, length)
		}
		if _, err := io.CopyN(io.Discard, h.conn, length); err != nil {
			return nil, err
		}
		h.refuse(opt, repErrTooBig, "the option is too long")
		return nil, h.send()
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(h.conn, data); err != nil {
		return nil, err
	}
	t, err := h.answer(opt, data)
	return t, errors.Join(err, h.send())
}

// answer puts the replies to an option together.
func (h *handshake) answer(opt uint32, data []byte) (*terms, error) {
	if h.tlsNeeded && !h.encrypted && opt != optStartTLS && opt != optAbort {
		if opt == optExportName {
			return nil, fmt.Errorf("%w: an export asked for in the clear", errProtocol)
		}
		h.refuse(opt, repErrTLSReqd, "this server wants TLS first")
		return nil, nil
	}
	switch opt {
	case optExportName:
		return h.exportName(string(data))
	case optAbort:
		h.put(opt, repAck, nil)
		return nil, errLeft
	case optList:
		h.list(data)
	case optStartTLS:
		return nil, h.startTLS(data)
	case optInfo, optGo:
		return h.info(opt, data), nil
	case optStructuredReply:
		if len(data) != 0 {
			h.refuse(opt, repErrInvalid, "this option has no data")
			break
		}
		h.structured = true
		h.put(opt, repAck, nil)
	case optListMetaContext, optSetMetaContext:
		h.metaContext(opt, data)
	default:
		h.refuse(opt, repErrUnsup, "this option is not supported")
	}
	return nil, nil
}

// put adds a reply.
func (h *handshake) put(opt, kind uint32, data []byte) {
	h.reply = binary.BigEndian.AppendUint64(h.reply, magicReply)
	h.reply = binary.BigEndian.AppendUint32(h.reply, opt)
	h.reply = binary.BigEndian.AppendUint32(h.reply, kind)
	h.reply = binary.BigEndian.AppendUint32(h.reply, uint32(len(data)))
	h.reply = append(h.reply, data...)
}

func (h *handshake) refuse(opt, kind uint32, why string) { h.put(opt, kind, []byte(why)) }

func (h *handshake) send() error {
	if len(h.reply) == 0 {
		return nil
	}
	_, err := h.conn.Write(h.reply)
	h.reply = h.reply[:0]
	return err
}

// startTLS changes to TLS and forgets what was agreed on before it.
func (h *handshake) startTLS(data []byte) error {
	config := h.server.options.TLS
	switch {
	case len(data) != 0 || h.encrypted:
		h.refuse(optStartTLS, repErrInvalid, "no data, and not twice")
		return nil
	case config == nil:
		h.refuse(optStartTLS, repErrPolicy, "this server has no certificate")
		return nil
	}
	h.put(optStartTLS, repAck, nil)
	if err := h.send(); err != nil {
		return err
	}
	secured := tls.Server(&carrier{Conn: h.conn}, config)
	h.conn = secured
	if err := secured.Handshake(); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	h.encrypted, h.structured, h.allocation = true, false, nil
	return nil
}
