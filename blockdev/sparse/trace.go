package sparse

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"

	"holdfast/blockdev"
	"holdfast/blockdev/envelope"
	"holdfast/blockdev/serve/control"
)

// traceFile lies beside an image that others have as their base: what the first of
// them to be used at a worker wanted of it, in order. It is a hint: nothing is
// flushed for it, and one that cannot be read is made again.
const traceFile = "trace.json"

func traceOf(id blockdev.ID) string { return string(id) + "/" + traceFile }

// trace gives what was wanted of a chain's base before; nil where nobody knows.
func (p *Pool) trace(c *chain) (chunks []int64) {
	if c == nil || !c.Origin.Valid() {
		return nil
	}
	payload, err := readEnvelope(p.image(c.Origin)+"/"+traceFile, traceOf(c.Origin))
	if err == nil {
		err = json.Unmarshal(payload, &chunks)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.log.Warn("a trace cannot be read: volumes are copied in order", "image", c.Origin, "err", err)
		return nil
	}
	return chunks
}

// keepTrace asks a worker that is about to end what was wanted of its base, unless
// that is known.
func (p *Pool) keepTrace(ctx context.Context, id blockdev.ID, w *control.Worker) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	if err := p.askTrace(ctx, id, w); err != nil {
		p.log.Warn("what a volume wanted of its base is not known", "image", id, "err", err)
	}
}

func (p *Pool) askTrace(ctx context.Context, id blockdev.ID, w *control.Worker) error {
	dir, _, err := p.locate(id)
	if err != nil {
		return err
	}
	c, err := readChain(id, dir)
	if err != nil || c == nil || !c.Origin.Valid() {
		return err
	}
	origin := p.image(c.Origin)
	there, err := exists(origin)
	if err != nil || !there || p.trace(c) != nil {
		return err
	}
	chunks, err := w.Trace(ctx)
	if errors.Is(err, blockdev.ErrNotFound) || err == nil && len(chunks) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	payload, err := json.Marshal(chunks)
	if err != nil {
		return err
	}
	sealed, err := envelope.Seal(traceOf(c.Origin), payload)
	if err != nil {
		return err
	}
	// Of a name of its own: volumes of one base may end at the same time.
	fresh := origin + "/" + unique(traceFile) + freshFile
	if err = os.WriteFile(fresh, sealed, 0o600); err == nil {
		err = os.Rename(fresh, origin+"/"+traceFile)
	}
	if errors.Is(err, fs.ErrNotExist) { // the base is on its way to the trash
		return nil
	}
	if err != nil {
		_ = os.Remove(fresh) // it may not be there
	}
	return noSpace(err)
}
