package api

import (
	"encoding/json"
	"slices"
	"strings"
	"time"

	"holdfast/blockdev/attach"
	"holdfast/engine"
)

// Attachment is one use of a volume by a sandbox.
type Attachment struct {
	ID        string `json:"id"`
	Holder    string `json:"holder"` // "sandbox:NAME" or "agent:NAME"
	Target    Target `json:"target"` // as it was asked for
	MountPath string `json:"mountPath,omitempty"`
	Serial    string `json:"serial,omitempty"` // of the device that a guest gets
	ReadOnly  bool   `json:"readOnly"`
	Kind      string `json:"kind,omitempty"`   // of what the sandbox has: file, block, vhost-user, nbd
	Socket    string `json:"socket,omitempty"` // of the worker that serves it, for who may attach
	Epoch     uint64 `json:"epoch"`
	Phase     string `json:"phase"`              // attaching, attached, detaching
	Failure   string `json:"failure,omitempty"`  // why the last step did not go through, and what is next
	Since     string `json:"since,omitempty"`    // when the phase, or the step to it, began
	Deadline  string `json:"deadline,omitempty"` // while steps are taken: when they have ended or are said to hang
	RetryAt   string `json:"retryAt,omitempty"`  // when the next try begins
	Forced    bool   `json:"forced,omitempty"`
	Fenced    string `json:"fenced,omitempty"` // of one that was detached by force: filesystem, worker or sandbox, if that had to be shut down or ended

	Limits      *RateLimits  `json:"limits,omitempty"`
	Enforcement *Enforcement `json:"limitsEnforcement,omitempty"`
	Launch      *Launch      `json:"launch,omitempty"`  // vm: what it is started with
	Remains     string       `json:"remains,omitempty"` // what is left to the guest, in plain words

	CreatedAt string `json:"createdAt"`
	CreatedBy string `json:"createdBy,omitempty"`
}

// Target says where a volume goes.
type Target struct {
	Type      string `json:"type"`
	Path      string `json:"path,omitempty"`      // host: the directory
	Container string `json:"container,omitempty"` // runc: its id
	Root      string `json:"root,omitempty"`      // runc: its state directory
	VMM       string `json:"vmm,omitempty"`       // vm: what will run it
	Socket    string `json:"socket,omitempty"`    // qemu: of a monitor (QMP); firecracker, cloud-hypervisor: of the API
	Agent     string `json:"agent,omitempty"`     // of a virtual machine: socket that leads to our agent in the guest
	QemuAgent string `json:"qemuAgent,omitempty"` // qemu: socket that leads to QEMU's own guest agent
	Transport string `json:"transport,omitempty"` // of a virtual machine: "vhost-user" for a worker's socket and nothing else; export: "tls" for a port
	Protocol  string `json:"protocol,omitempty"`  // export: "nbd" or "vhost-user"
	Owner     int    `json:"owner,omitempty"`     // export: user of the server's host who may connect besides root

	Clients []string `json:"clients,omitempty"` // export by tls: names, of which a client's certificate has one
}

func (t Target) target() attach.Target {
	return attach.Target{
		Type: t.Type, Path: t.Path, Container: t.Container, Root: t.Root, VMM: t.VMM,
		Socket: t.Socket, Agent: t.Agent, QemuAgent: t.QemuAgent, Transport: t.Transport, Protocol: t.Protocol, Owner: t.Owner,
		Clients: clientsText(t.Clients),
	}
}

// clientsText puts names into one text, which is none that a target may have where one
// of them is not to be told from several, or from nobody's.
func clientsText(names []string) string {
	if slices.ContainsFunc(names, func(name string) bool { return name == "" || strings.Contains(name, " ") }) {
		return " "
	}
	return strings.Join(names, " ")
}

func targetBody(t attach.Target) Target {
	return Target{
		Type: t.Type, Path: t.Path, Container: t.Container, Root: t.Root, VMM: t.VMM,
		Socket: t.Socket, Agent: t.Agent, QemuAgent: t.QemuAgent, Transport: t.Transport, Protocol: t.Protocol, Owner: t.Owner,
		Clients: strings.Fields(t.Clients),
	}
}

// AttachmentRequest is the body of POST.
type AttachmentRequest struct {
	Holder    string `json:"holder"`
	Target    Target `json:"target"`
	MountPath string `json:"mountPath"`
	ReadOnly  bool   `json:"readOnly"`
	Force     bool   `json:"force"` // take the volume from whoever is in the way

	Ephemeral *EphemeralRequest `json:"ephemeral"` // make the volume for this attachment

	Limits RateLimits `json:"limits"`
}

// EphemeralRequest is the volume that is made for an attachment and deleted with it.
type EphemeralRequest struct {
	Size       int64  `json:"size"` // MiB
	Template   string `json:"template"`
	Filesystem string `json:"filesystem"`
	Region     string `json:"region"`
}

// Launch is how a virtual machine is started with a volume: one of arguments and
// document; or where an export is connected to.
type Launch struct {
	Path      string          `json:"path"` // of the image or socket, as long as the attachment lasts
	URI       string          `json:"uri,omitempty"`
	Arguments []string        `json:"arguments,omitempty"`
	Document  json.RawMessage `json:"document,omitempty"`
	File      string          `json:"file,omitempty"` // where the document goes
	Process   int             `json:"process,omitempty"`
}

func attachmentBody(a engine.Attachment) Attachment {
	return Attachment{
		ID: a.ID, Holder: a.Holder, MountPath: a.MountPath, Serial: a.Serial, ReadOnly: a.ReadOnly, Kind: string(a.Kind), Epoch: a.Epoch, Phase: string(a.Phase),
		Target:  targetBody(a.Asked),
		Limits:  limitsBody(a.Limits),
		Failure: a.Failure, Since: optionalStamp(a.Since), Deadline: optionalStamp(a.Deadline), RetryAt: optionalStamp(a.RetryAt), Forced: a.Forced, Fenced: string(a.Fenced), CreatedAt: stamp(a.CreatedAt), CreatedBy: a.CreatedBy,
	}
}

func optionalStamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return stamp(t)
}

func createAttachment(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	if err := c.mayAttach(); err != nil {
		return err
	}
	var b AttachmentRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	if b.Target.Type == SandboxTarget {
		return invalid("target.type", "volumes of this server's own sandboxes are named when the sandbox is created (spec.volumes)")
	}
	a, err := c.s.o.Engine.Attach(c.r.Context(), c.workspace, name, engine.AttachVolume{
		Holder: b.Holder, MountPath: b.MountPath, ReadOnly: b.ReadOnly, Force: b.Force, Limits: b.Limits.limits(), Actor: c.principal.actor(),
		Target:    b.Target.target(),
		Ephemeral: b.Ephemeral.volume(),
	})
	if err != nil {
		return err
	}
	v, err := c.s.o.Engine.Volume(c.workspace, name)
	if err != nil {
		return err
	}
	return c.launched(v, a)
}

func (r *EphemeralRequest) volume() *engine.EphemeralVolume {
	if r == nil {
		return nil
	}
	return &engine.EphemeralVolume{SizeMiB: r.Size, Template: r.Template, Filesystem: r.Filesystem, Region: r.Region}
}

// launched answers with an attachment, and how its sandbox is started where that is
// asked.
func (c *call) launched(v engine.Volume, a engine.Attachment) error {
	b := c.placed(v, a)
	l, err := c.s.o.Engine.Launch(c.r.Context(), v, a)
	if err != nil {
		return err
	}
	if l != nil {
		uri := l.URI
		if a.Target.Transport == "tls" && c.mayAttach() != nil {
			uri = "" // it has the export's name, which opens the volume
		}
		b.Launch = &Launch{Path: l.Path, URI: uri, Arguments: l.Arguments, Document: l.Document, File: l.File, Process: l.Pid}
	}
	return c.json(b)
}

// placed is an attachment with where it is on this host, for those who may know.
func (c *call) placed(v engine.Volume, a engine.Attachment) Attachment {
	b := c.attachment(a)
	if c.mayAttach() == nil {
		b.Socket = c.s.o.Engine.Socket(v, a)
	}
	return b
}

func listAttachments(c *call) error {
	v, err := c.pathVolume()
	if err != nil {
		return err
	}
	all := make([]Attachment, len(v.Attachments))
	for i, a := range v.Attachments {
		all[i] = c.placed(v, a)
	}
	return c.json(all)
}

func getAttachment(c *call) error {
	v, err := c.pathVolume()
	if err != nil {
		return err
	}
	for _, a := range v.Attachments {
		if a.ID == c.r.PathValue("id") {
			return c.launched(v, a)
		}
	}
	return refuse(ErrMissing, "volume %q has no attachment %q", v.Name, clip(c.r.PathValue("id"), 64))
}

// force reads whether a detach is by force: nothing but "true" is.
func (c *call) force() (bool, error) {
	switch value := c.r.URL.Query().Get("force"); value {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	default:
		return false, refuse(ErrBadRequest, "force: must be true or false")
	}
}

func deleteAttachment(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	force, err := c.force()
	if err != nil {
		return err
	}
	if !force {
		if err := c.ownSandboxHolds(name, c.r.PathValue("id")); err != nil {
			return err
		}
	}
	detach := c.s.o.Engine.Detach
	if force {
		detach = c.s.o.Engine.ForceDetach
	}
	a, err := detach(c.r.Context(), c.workspace, name, c.r.PathValue("id"), c.principal.actor())
	if err != nil {
		return err
	}
	return c.json(c.attachment(a))
}

// SandboxTarget is the type of target of the sandboxes that this server runs.
// Their volumes come and go with them.
const SandboxTarget = "sandbox"

// ownSandboxHolds is the conflict when an attachment was made by creating a
// sandbox: it is undone by deleting that.
func (c *call) ownSandboxHolds(volume, id string) error {
	v, err := c.s.o.Engine.Volume(c.workspace, volume)
	if err != nil {
		return err
	}
	for _, a := range v.Attachments {
		if a.ID == id && a.Target.Type == SandboxTarget {
			return &engine.Problem{Kind: engine.ErrConflict, Message: "the volume belongs to " + a.Holder + " as long as that lives: delete the sandbox, or take the volume away by force"}
		}
	}
	return nil
}
