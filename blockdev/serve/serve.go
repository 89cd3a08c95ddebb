package serve

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/meter"
)

// Service is how a volume does that a worker serves.
type Service struct {
	Since   time.Time // when the worker began
	Pid     int
	Kind    blockdev.Kind // blockdev.VhostUser or blockdev.NBD
	Clients int           // virtual machines or NBD connections that have it now
	Meter   meter.Snapshot
	Limits  blockdev.Limits
	Failed  string     // why no write is acknowledged any more; "" while all is well
	Layers  *Hydration // nil for a flat image
	Exposed []Exposed  // where clients connect over the network
}

// Exposed is a way to a volume over the network.
type Exposed struct {
	Name    string // of the export
	Address string // host and port
	Clients int    // that have the volume now; they are among those of the Service
	Met     string // Exposure.Met of what clients are met with that come now
}

// Exposure is a way to a volume over the network: NBD over TLS, with certificates on
// both sides.
type Exposure struct {
	Name string // of the export; who does not know it gets nothing
	// Socket listens at a TCP address; nil for one of that name that is there already:
	// clients that come from now on are met with the rest.
	Socket *os.File
	// Certificate with its chain, its key, and the authorities whose clients are let in
	// are PEM, together at most MaxPEM bytes.
	Certificate, Key, Authorities []byte
	// Clients are names, of which a client's certificate must have one as its subject's
	// common name or among its DNS names; empty: any certificate of the authorities.
	Clients []string
}

// Met tells apart what clients are met with: a digest of all but the socket.
func (e *Exposure) Met() string {
	h := sha256.New()
	for _, part := range [][]byte{e.Certificate, e.Key, e.Authorities, []byte(strings.Join(e.Clients, " "))} {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// MaxPEM bounds what comes with an Exposure, in bytes: it goes to the worker in one
// message.
const MaxPEM = 64 << 10

// Exposer is a backend whose workers take clients over the network as well.
type Exposer interface {
	// Expose has the worker of an image that is open as NBD take clients by an exposure,
	// until the worker ends. blockdev.ErrInvalid for certificates that are of no use,
	// blockdev.ErrExists for a socket where the name has one, blockdev.ErrNotFound for a
	// name that has none, and while no worker serves the image.
	Expose(ctx context.Context, id blockdev.ID, e Exposure) error
	// Withdraw ends an exposure. blockdev.ErrBusy while a client has the volume by it;
	// then nothing has changed. By force such clients' connections are ended, and on nil
	// what they had begun has ended. None of that name is success.
	Withdraw(ctx context.Context, id blockdev.ID, name string, force bool) error
}

// Hydration is how far a layered image is on its way to a flat one.
type Hydration struct {
	Sealed int   // layers below the top
	Held   int64 // bytes of the volume that its top layer holds
	Size   int64 // of the volume, bytes
	Copied int64 // bytes that were fetched from the base since the worker began, zeroes not counted
	// FailingSince is when the base began to fail, which readers wait out; zero while
	// it answers.
	FailingSince time.Time
	Tries        int64  // that failed since then
	Reason       string // of the last failure, in an operator's words
}

// Observer is a backend whose images workers serve.
type Observer interface {
	// Observe asks the worker of an image. blockdev.ErrNotFound while it has none.
	Observe(ctx context.Context, id blockdev.ID) (Service, error)
}

// Sentry is a backend that can tell of a worker's end when it happens.
type Sentry interface {
	// AwaitEnd returns nil when the worker that serves an image at the time of the call
	// has ended, at once where none does, and an error when ctx has or it cannot tell.
	AwaitEnd(ctx context.Context, id blockdev.ID) error
}

// Reviver is a backend whose devices outlive the workers that serve them.
type Reviver interface {
	// Revive has a worker serve the device of an opening: another one where it has ended.
	// An opening that is none any more, or has no device over a worker, is success. It may
	// be called beside any other call for the image.
	Revive(ctx context.Context, id blockdev.ID, lease string) error
}

// Throttler is a backend whose workers bound what is done to an image.
type Throttler interface {
	// Throttle makes exactly these limits hold for an image that is open as VhostUser or
	// NBD, until it is closed; the zero Limits lift all. blockdev.ErrNotFound while no
	// worker serves it.
	Throttle(ctx context.Context, id blockdev.ID, limits blockdev.Limits) error
}
