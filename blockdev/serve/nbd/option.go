package nbd

import (
	"cmp"
	"encoding/binary"
	"fmt"
)

// exportName is the oldest way to end the handshake: an error ends the connection.
func (h *handshake) exportName(name string) (*terms, error) {
	e := h.server.find(name)
	if e == nil {
		return nil, fmt.Errorf("%w: no export %q", errProtocol, name)
	}
	t := h.terms(e)
	h.reply = binary.BigEndian.AppendUint64(h.reply, uint64(t.size))
	h.reply = binary.BigEndian.AppendUint16(h.reply, h.exportFlags(e))
	if !h.noZeros {
		h.reply = append(h.reply, make([]byte, 124)...)
	}
	return t, nil
}

func (h *handshake) terms(e *Export) *terms {
	return &terms{
		export: e, size: e.size.Load(), block: e.block, readOnly: e.readOnly, structured: h.structured,
		allocation: h.structured && h.allocation != nil && h.server.find(*h.allocation) == e,
	}
}

func (h *handshake) exportFlags(e *Export) uint16 {
	if h.structured {
		return e.flags() | exportDF
	}
	return e.flags()
}

func (h *handshake) list(data []byte) {
	if len(data) != 0 {
		h.refuse(optList, repErrInvalid, "this option has no data")
		return
	}
	if h.server.options.Unlisted {
		h.refuse(optList, repErrPolicy, "exports are not listed: ask for one by its name")
		return
	}
	for _, e := range h.server.all() {
		one := binary.BigEndian.AppendUint32(nil, uint32(len(e.name)))
		one = append(one, e.name...)
		h.put(optList, repServer, append(one, e.description...))
	}
	h.put(optList, repAck, nil)
}

// info answers INFO and GO; it gives terms when GO succeeded.
func (h *handshake) info(opt uint32, data []byte) *terms {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		h.refuse(opt, repErrInvalid, "the lengths do not fit")
		return nil
	}
	e := h.server.find(name)
	if e == nil {
		h.refuse(opt, repErrUnknown, "there is no export of this name")
		return nil
	}
	t := h.terms(e)
	one := binary.BigEndian.AppendUint16(nil, infoExport)
	one = binary.BigEndian.AppendUint64(one, uint64(t.size))
	h.put(opt, repInfo, binary.BigEndian.AppendUint16(one, h.exportFlags(e)))
	for wanted := rest[2:]; len(wanted) > 0; wanted = wanted[2:] {
		switch binary.BigEndian.Uint16(wanted) {
		case infoName:
			h.put(opt, repInfo, append(binary.BigEndian.AppendUint16(nil, infoName), cmp.Or(name, e.name)...))
		case infoDescription:
			if e.description != "" {
				h.put(opt, repInfo, append(binary.BigEndian.AppendUint16(nil, infoDescription), e.description...))
			}
		}
	}
	// Told unasked: who sends other sizes gets errors.
	one = binary.BigEndian.AppendUint16(nil, infoBlockSize)
	one = binary.BigEndian.AppendUint32(one, uint32(t.block))
	one = binary.BigEndian.AppendUint32(one, 4096)
	h.put(opt, repInfo, binary.BigEndian.AppendUint32(one, maxPayload))
	h.put(opt, repAck, nil)
	if opt == optInfo {
		return nil
	}
	return t
}

// metaContext answers LIST_ and SET_META_CONTEXT. There is one context.
func (h *handshake) metaContext(opt uint32, data []byte) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 4 {
		h.refuse(opt, repErrInvalid, "the lengths do not fit")
		return
	}
	count := binary.BigEndian.Uint32(rest)
	rest = rest[4:]
	found := opt == optListMetaContext && count == 0
	for range count {
		var query string
		if query, rest, ok = cutString(rest); !ok {
			h.refuse(opt, repErrInvalid, "the lengths do not fit")
			return
		}
		found = found || query == contextAllocation || opt == optListMetaContext && query == "base:"
	}
	switch {
	case len(rest) != 0:
		h.refuse(opt, repErrInvalid, "the lengths do not fit")
		return
	case opt == optSetMetaContext && !h.structured:
		h.refuse(opt, repErrInvalid, "structured replies come first")
		return
	}
	if opt == optSetMetaContext {
		h.allocation = nil
	}
	if h.server.find(name) == nil {
		h.refuse(opt, repErrUnknown, "there is no export of this name")
		return
	}
	if found {
		id := uint32(0)
		if opt == optSetMetaContext {
			h.allocation, id = &name, contextAllocationID
		}
		h.put(opt, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), contextAllocation...))
	}
	h.put(opt, repAck, nil)
}

// cutString takes a length and as many bytes off data.
func cutString(data []byte) (s string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(data)
	if n > maxString || int(n) > len(data)-4 {
		return "", nil, false
	}
	return string(data[4 : 4+n]), data[4+n:], true
}
