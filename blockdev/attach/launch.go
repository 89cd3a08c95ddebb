package attach

import (
	"context"
	"encoding/json"

	"holdfast/blockdev/filesystem"
)

// Finder is an Attacher whose sandboxes may begin after the attachment is made.
type Finder interface {
	// Find completes a target by the sandbox that holds the volume now, and gives
	// it as it is where there is none.
	Find(ctx context.Context, r Request) (Target, error)
}

// Witness is an Attacher that can tell who has an image open, whatever is recorded.
type Witness interface {
	// Users are the processes of this host, but this one, that have a file or device
	// open. None found is no proof that there are none.
	Users(ctx context.Context, path string) ([]Target, error)
}

// Picky is an Attacher whose needs differ by target.
type Picky interface {
	NeedsOf(t Target) Needs
}

// Launcher is an Attacher that tells how a sandbox is started with the volume.
type Launcher interface {
	// Launch is of a made attachment; t is the filesystem that was put on the
	// volume, for sandboxes that are told what to mount.
	Launch(ctx context.Context, r Request, t filesystem.Type) (Launch, error)
}

// Launch is what whoever starts a sandbox must give it so that it has a volume. Of
// Arguments and Document one is set.
type Launch struct {
	Path      string          // of the image, or of the socket that serves it; leads nowhere once the volume is detached
	URI       string          // of an NBD socket
	Arguments []string        // of the program, each one word
	Document  json.RawMessage // what its API or a file of its takes
	File      string          // where Document goes, if into a file
	Pid       int             // of the process that has the image open; 0: not started
}
