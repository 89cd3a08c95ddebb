package client

import (
	"context"
	"encoding/json"
	"io"
	"net/url"
	"time"
)

// Attachment is one use of a volume by a sandbox.
type Attachment struct {
	ID        string    `json:"id,omitempty"`
	Holder    string    `json:"holder"` // "sandbox:NAME" or "agent:NAME"
	Target    Target    `json:"target"`
	MountPath string    `json:"mountPath,omitempty"`
	Serial    string    `json:"serial,omitempty"` // by which a guest finds the device: /dev/disk/by-id/virtio-SERIAL
	ReadOnly  bool      `json:"readOnly"`
	Kind      string    `json:"kind,omitempty"`   // of what the sandbox has: file, block, vhost-user, nbd
	Socket    string    `json:"socket,omitempty"` // of the worker that serves it, for keys that may attach
	Epoch     uint64    `json:"epoch,omitempty"`
	Phase     string    `json:"phase,omitempty"`   // attaching, attached, detaching
	Failure   string    `json:"failure,omitempty"` // why the last step did not go through, and what is next
	Since     time.Time `json:"since,omitzero"`    // when the phase, or the step to it, began
	Deadline  time.Time `json:"deadline,omitzero"` // while steps are taken: when they have ended or are said to hang
	RetryAt   time.Time `json:"retryAt,omitzero"`  // when the next try begins
	Forced    bool      `json:"forced,omitempty"`  // detached by force
	Fenced    string    `json:"fenced,omitempty"`  // of one that was: what was shut down or ended for it

	Limits      *RateLimits  `json:"limits,omitempty"`
	Enforcement *Enforcement `json:"limitsEnforcement,omitempty"` // of the limits
	Remains     string       `json:"remains,omitempty"`           // what is left to the guest, in plain words
	Launch      *Launch      `json:"launch,omitempty"`            // vm: what it is started with

	Force     bool       `json:"force,omitempty"`     // of Attach: take the volume from whoever is in the way
	Ephemeral *Ephemeral `json:"ephemeral,omitempty"` // of Attach: make the volume, and delete it with the attachment's end
	CreatedAt time.Time  `json:"createdAt,omitzero"`
	CreatedBy string     `json:"createdBy,omitempty"`
}

// Ephemeral is a volume that is made for an attachment.
type Ephemeral struct {
	SizeMiB    int64  `json:"size"`
	Template   string `json:"template,omitempty"`
	Filesystem string `json:"filesystem,omitempty"`
	Region     string `json:"region,omitempty"`
}

// Launch is how a virtual machine is started with a volume: by one of Arguments and
// Document; or where an export is connected to.
type Launch struct {
	Path      string          `json:"path"` // of the image or socket, as long as the attachment lasts
	URI       string          `json:"uri,omitempty"`
	Arguments []string        `json:"arguments,omitempty"`
	Document  json.RawMessage `json:"document,omitempty"`
	File      string          `json:"file,omitempty"`    // where Document goes
	Process   int             `json:"process,omitempty"` // that has the image open
}

// Target says where a volume goes.
type Target struct {
	Type      string `json:"type"`                // "host", "runc", "qemu", "firecracker", "cloud-hypervisor", "vm" or "export"
	VMM       string `json:"vmm,omitempty"`       // vm, which does not run yet: "qemu", "firecracker", "cloud-hypervisor" or "kata"
	Path      string `json:"path,omitempty"`      // host: directory
	Container string `json:"container,omitempty"` // runc: id
	Root      string `json:"root,omitempty"`      // runc: its state directory
	Socket    string `json:"socket,omitempty"`    // qemu: of a monitor (QMP); firecracker, cloud-hypervisor: of the API; export: where a link to the socket is made
	Agent     string `json:"agent,omitempty"`     // of a virtual machine: socket that leads to our agent in the guest
	QemuAgent string `json:"qemuAgent,omitempty"` // qemu: socket that leads to QEMU's own guest agent
	Transport string `json:"transport,omitempty"` // of a virtual machine: "vhost-user" for a worker's socket and nothing else; export: "tls" for a port of the server's host
	Protocol  string `json:"protocol,omitempty"`  // export: "nbd" or "vhost-user"
	Owner     int    `json:"owner,omitempty"`     // export: user of the server's host who may connect besides root

	Clients []string `json:"clients,omitempty"` // export by tls: names, of which a client's certificate has one; empty: any
}

// RateLimits bound what an attachment reads and writes, per second; 0 is no limit.
type RateLimits struct {
	ReadIOPS   int64 `json:"readIops,omitempty"`
	WriteIOPS  int64 `json:"writeIops,omitempty"`
	ReadBytes  int64 `json:"readBytesPerSecond,omitempty"`
	WriteBytes int64 `json:"writeBytesPerSecond,omitempty"`
}

// Enforcement says how limits hold on the server's host, and for what they do not.
type Enforcement struct {
	Mechanism string   `json:"mechanism"`
	Gaps      []string `json:"gaps"`
}

// SetLimits replaces an attachment's limits while it is in use.
func (c *Client) SetLimits(ctx context.Context, volume, id string, l RateLimits) (Attachment, error) {
	var out Attachment
	err := c.do(ctx, call{method: "PUT", path: []string{"volumes", volume, "attachments", id, "limits"}, body: l}, &out)
	return out, err
}

// Attach makes a volume visible in a sandbox, on return. The same request
// again gets the same answer.
func (c *Client) Attach(ctx context.Context, volume string, a Attachment) (Attachment, error) {
	var out Attachment
	err := c.do(ctx, call{method: "POST", path: []string{"volumes", volume, "attachments"}, body: a}, &out)
	return out, err
}

// Attachments lists a volume's attachments.
func (c *Client) Attachments(ctx context.Context, volume string) ([]Attachment, error) {
	var out []Attachment
	err := c.do(ctx, call{method: "GET", path: []string{"volumes", volume, "attachments"}}, &out)
	return out, err
}

// Attachment finds one.
func (c *Client) Attachment(ctx context.Context, volume, id string) (Attachment, error) {
	var out Attachment
	err := c.do(ctx, call{method: "GET", path: []string{"volumes", volume, "attachments", id}}, &out)
	return out, err
}

// Detach takes a volume out of a sandbox; what was written is durable on return.
func (c *Client) Detach(ctx context.Context, volume, id string) (Attachment, error) {
	var out Attachment
	err := c.do(ctx, call{method: "DELETE", path: []string{"volumes", volume, "attachments", id}}, &out)
	return out, err
}

// ForceDetach takes a volume from a holder that does not let go. On return the
// holder provably cannot write to it any more.
func (c *Client) ForceDetach(ctx context.Context, volume, id string) (Attachment, error) {
	var out Attachment
	err := c.do(ctx, call{method: "DELETE", path: []string{"volumes", volume, "attachments", id}, query: url.Values{"force": {"true"}}}, &out)
	return out, err
}

// File is one entry of a directory of a volume.
type File struct {
	Name    string    `json:"name"`
	Type    string    `json:"type"` // file, directory, symlink, device, pipe, socket
	Mode    string    `json:"mode"` // octal
	UID     int       `json:"uid"`
	GID     int       `json:"gid"`
	Size    int64     `json:"size"` // bytes
	ModTime time.Time `json:"modTime,omitzero"`
}

// ListFiles lists a directory of a detached volume.
func (c *Client) ListFiles(ctx context.Context, volume, dir string) ([]File, error) {
	var out struct {
		Entries []File `json:"entries"`
	}
	err := c.do(ctx, call{method: "GET", path: []string{"volumes", volume, "files"}, query: url.Values{"path": {dir}}}, &out)
	return out.Entries, err
}

// ReadFile writes a file of a detached volume to w.
func (c *Client) ReadFile(ctx context.Context, volume, file string, w io.Writer) error {
	resp, err := c.send(ctx, call{method: "GET", path: []string{"volumes", volume, "files", "content"}, query: url.Values{"path": {file}}})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(w, resp.Body)
	return err
}
