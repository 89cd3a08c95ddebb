package engine

import (
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
)

// Phase names the next step of a volume.
type Phase string

const (
	Allocating Phase = "allocating" // the wish is recorded; the image is being made
	Hydrating  Phase = "hydrating"  // the image is being filled
	Ready      Phase = "ready"
	Deleting   Phase = "deleting"
)

// Status is a phase in the contract's words.
type Status string

const (
	StatusDeploying  Status = "DEPLOYING"
	StatusDeployed   Status = "DEPLOYED"
	StatusFailed     Status = "FAILED"
	StatusDeleting   Status = "DELETING"
	StatusTerminated Status = "TERMINATED"
)

// Volume is a volume's record, and (as canonical JSON) its self-description
// beside the image. Sizes on the outside are MiB.
type Volume struct {
	ID          blockdev.ID       `json:"id"`
	Sequence    uint64            `json:"sequence"` // of changes; the higher one is the truth
	Workspace   string            `json:"workspace"`
	Name        string            `json:"name"`
	DisplayName string            `json:"displayName,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	ExternalID  string            `json:"externalId,omitempty"`
	Region      string            `json:"region"`
	SizeMiB     int64             `json:"sizeMiB"` // wanted
	Filesystem  filesystem.Type   `json:"filesystem"`
	Pool        string            `json:"pool,omitempty"`     // where the image is; empty: the host's first
	UUID        string            `json:"uuid"`               // of the filesystem
	Template    string            `json:"template,omitempty"` // as resolved: "name:N"
	Revision    blockdev.ID       `json:"revision,omitempty"`
	Snapshot    blockdev.ID       `json:"snapshot,omitempty"` // that it was made from
	ForkOf      string            `json:"forkOf,omitempty"`   // the same as "volume/snapshot", by their names then
	// SanitizedFrom is the volume whose files it was made of.
	SanitizedFrom blockdev.ID  `json:"sanitizedFrom,omitempty"`
	Remote        bool         `json:"remote,omitempty"`   // blocks of it still have to come from far away
	Awaiting      *time.Time   `json:"awaiting,omitempty"` // since when these do not come, where that was made an event
	Phase         Phase        `json:"phase"`
	Failure       string       `json:"failure,omitempty"`    // a permanent error: shows as FAILED
	Epoch         uint64       `json:"epoch,omitempty"`      // of the newest writable attachment
	Tainted       bool         `json:"tainted,omitempty"`    // raw blocks were writable by a tenant
	Ephemeral     bool         `json:"ephemeral,omitempty"`  // deleted with the end of its last attachment
	GuestMiB      int64        `json:"guestMiB,omitempty"`   // of the device when a sandbox last got it as it is
	CheckFirst    bool         `json:"checkFirst,omitempty"` // an offline growth was begun: e2fsck before the next use
	Frozen        *Freeze      `json:"frozen,omitempty"`     // set before the filesystem is frozen
	Trim          *TrimNote    `json:"trim,omitempty"`
	Move          *Move        `json:"move,omitempty"`     // to another pool; the volume is in Pool
	Incoming      bool         `json:"incoming,omitempty"` // of a description: the image is what a move has copied so far, and no volume
	Attachments   []Attachment `json:"attachments,omitempty"`
	Events        []Event      `json:"events,omitempty"` // newest last, bounded
	CreatedAt     time.Time    `json:"createdAt"`
	UpdatedAt     time.Time    `json:"updatedAt"`
	CreatedBy     string       `json:"createdBy,omitempty"`
	UpdatedBy     string       `json:"updatedBy,omitempty"`
}

// Status tells the volume's state in the contract's words.
func (v Volume) Status() Status {
	switch {
	case v.Phase == Deleting:
		return StatusDeleting
	case v.Failure != "":
		return StatusFailed
	case v.Phase == Ready:
		return StatusDeployed
	default:
		return StatusDeploying
	}
}

// AttachedTo is the holder that state.attachedTo shows: the writer, else the
// first reader, else "".
func (v Volume) AttachedTo() string {
	for _, a := range v.Attachments {
		if !a.ReadOnly {
			return a.Holder
		}
	}
	if len(v.Attachments) > 0 {
		return v.Attachments[0].Holder
	}
	return ""
}

// AttachmentPhase names the next step of an attachment.
type AttachmentPhase string

const (
	Attaching AttachmentPhase = "attaching"
	Attached  AttachmentPhase = "attached"
	Detaching AttachmentPhase = "detaching"
)

// Attachment is one use of a volume by a sandbox. It is part of the volume's
// record, so that both change in one commit.
type Attachment struct {
	ID        string          `json:"id"`     // "att-" and 26 characters
	Holder    string          `json:"holder"` // "sandbox:NAME" or "agent:NAME"
	Target    attach.Target   `json:"target"`
	Asked     attach.Target   `json:"asked"` // as the caller gave it: the same request twice gets the same answer
	MountPath string          `json:"mountPath,omitempty"`
	Serial    string          `json:"serial,omitempty"` // of the device, where the sandbox finds it by that
	ReadOnly  bool            `json:"readOnly"`
	Kind      blockdev.Kind   `json:"kind,omitempty"` // of the endpoint that the sandbox has; durable before it has a socket
	Epoch     uint64          `json:"epoch"`          // of the volume when this was made
	Phase     AttachmentPhase `json:"phase"`
	Limits    blockdev.Limits `json:"limits,omitzero"`
	Failure   string          `json:"failure,omitempty"` // why the last step did not go through, and what is next
	Since     time.Time       `json:"since,omitzero"`    // the phase, or the step to it, began
	Deadline  time.Time       `json:"deadline,omitzero"` // while steps are taken: when they have ended, or are said to hang
	RetryAt   time.Time       `json:"retryAt,omitzero"`  // when the next try begins
	Forced    bool            `json:"forced,omitempty"`  // detached by force: its filesystem may be shut down, its worker ended, and it is not opened or flushed any more
	Fenced    Fence           `json:"-"`                 // of one that was detached: what force had to do
	CreatedAt time.Time       `json:"createdAt"`
	CreatedBy string          `json:"createdBy,omitempty"`
}

// Event is something that happened to a volume.
type Event struct {
	Type    string    `json:"type"`   // "deployment", "resize", "attach", "detach", "freeze", "thaw", "trim", "capture", "snapshot", "move", "sanitize", "hydration", "failure"
	Status  Status    `json:"status"` // after it
	Message string    `json:"message"`
	Time    time.Time `json:"time"`
}

// Sizes are the three numbers of a volume, and its space, in bytes.
type Sizes struct {
	Wanted     int64
	Device     int64
	Filesystem int64 // 0 for filesystem "none", and where only a virtual machine may look
	Allocated  int64
	Shared     int64
	Pending    string     // what growth waits for, and why; empty when all three agree
	Hydration  *Hydration // nil where all bytes lie in one place
}
