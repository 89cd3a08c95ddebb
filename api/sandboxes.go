package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
)

// Sandboxes runs sandboxes on this machine. sandbox.Runtime is one. Its errors
// are engine.Problem with a sentinel of the engine or of this package.
type Sandboxes interface {
	// Create returns when the sandbox is usable. With missingOnly one that is there
	// is the answer; else it is ErrSandboxExists.
	Create(ctx context.Context, s NewSandbox, missingOnly bool) (Sandbox, error)
	Sandbox(workspace, name string) (Sandbox, error)
	SandboxByExternalID(workspace, externalID string) (Sandbox, error)
	// List gives all of a workspace's, the newest first.
	List(workspace string) []Sandbox
	Change(ctx context.Context, workspace, name string, c ChangeSandbox) (Sandbox, error)
	// Delete answers when the deletion is durable; it is done soon after.
	Delete(ctx context.Context, workspace, name, actor string) (Sandbox, error)

	// Exec starts a process; with r.Wait it returns when that has ended, or ctx.
	Exec(ctx context.Context, workspace, name string, r Exec) (Process, error)
	Processes(workspace, name string) ([]Process, error)
	Process(workspace, name, id string) (Process, error)
	// EndProcess asks a process and its group to end, or with kill ends them.
	EndProcess(ctx context.Context, workspace, name, id string, kill bool) (Process, error)
	// FollowProcess gives what a process writes, line by line, from the beginning
	// until its end. stream is "stdout" or "stderr".
	FollowProcess(ctx context.Context, workspace, name, id string, line func(stream, text string) error) error
	WriteStdin(workspace, name, id string, from io.Reader) error
	CloseStdin(workspace, name, id string) error

	// Look describes a file or lists a directory.
	Look(ctx context.Context, workspace, name, path string) (SandboxEntry, error)
	ReadFile(ctx context.Context, workspace, name, path string, to io.Writer) error
	WriteFile(ctx context.Context, workspace, name, path, permissions string, from io.Reader) error
	MakeDir(ctx context.Context, workspace, name, path, permissions string) error
	RemoveFile(ctx context.Context, workspace, name, path string, recursive bool) error
	// JoinFiles makes one file of parts, in order, and removes them.
	JoinFiles(ctx context.Context, workspace, name, path, permissions string, parts []string) error
}

// Sentinels of the sandboxes.
var (
	// ErrSandboxExists: the name is taken. 409.
	ErrSandboxExists = errors.New("sandbox already exists")
	// ErrSandboxCreating: the name is taken by one that is being made. 409.
	ErrSandboxCreating = errors.New("sandbox is being created")
	// ErrSandboxDown: the sandbox is not running. 409.
	ErrSandboxDown = errors.New("sandbox is not running")
	// ErrSandboxFile: a file operation that the sandbox refused. 409.
	ErrSandboxFile = errors.New("the sandbox refused")
	// ErrSandboxVolume: a sandbox names a volume that is not there. 400: on the
	// sandbox's creation 404 would be about the sandbox.
	ErrSandboxVolume = errors.New("volume not found")
)

// NewSandbox asks for a sandbox.
type NewSandbox struct {
	Workspace, Name, DisplayName, ExternalID, Region, Image, Actor string

	Labels    map[string]string
	MemoryMiB int64 // 0: the server's default
	Envs      []EnvVar
	Ports     []Port
	Volumes   []VolumeMount
}

// ChangeSandbox is a PUT: nil fields keep their value. What cannot be changed
// must be what it is.
type ChangeSandbox struct {
	DisplayName, ExternalID, Region, Image *string

	Labels    map[string]string
	MemoryMiB *int64
	Volumes   []VolumeMount // nil: not said
	Actor     string
}

// Sandbox is a sandbox on the wire.
type Sandbox struct {
	Metadata SandboxMetadata `json:"metadata"`
	Spec     SandboxSpec     `json:"spec"`
	Events   []Event         `json:"events"`
	Status   string          `json:"status"`
	State    string          `json:"state,omitempty"` // RUNNING
}

// SandboxMetadata also says where the sandbox is reached.
type SandboxMetadata struct {
	Metadata

	URL string `json:"url"`
}

// SandboxSpec is what was asked for, with what was left out filled in.
type SandboxSpec struct {
	Region  string         `json:"region"`
	Runtime SandboxRuntime `json:"runtime"`
	Volumes []VolumeMount  `json:"volumes,omitempty"`
}

// SandboxRuntime is how the sandbox runs.
type SandboxRuntime struct {
	Image  string   `json:"image"`
	Memory int64    `json:"memory"` // MiB
	Envs   []EnvVar `json:"envs,omitempty"`
	Ports  []Port   `json:"ports,omitempty"`
}

// EnvVar is a variable of every process's environment.
type EnvVar struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Port is kept and shown; a sandbox has no network.
type Port struct {
	Name     string `json:"name,omitempty"`
	Target   int64  `json:"target"`
	Protocol string `json:"protocol,omitempty"`
}

// VolumeMount is a volume in a sandbox.
type VolumeMount struct {
	Name      string `json:"name"`
	MountPath string `json:"mountPath"`
	ReadOnly  bool   `json:"readOnly"`
	Type      string `json:"type,omitempty"`   // persistent (default), ephemeral
	SizeMB    int64  `json:"sizeMb,omitempty"` // MiB, of an ephemeral one
}

// SandboxList is a page of sandboxes.
type SandboxList struct {
	Data []Sandbox `json:"data"`
	Meta PageMeta  `json:"meta"`
}

// SandboxRequest is the body of POST and PUT. Absent and null fields are not
// given; read-only fields and unknown ones are ignored.
type SandboxRequest struct {
	Metadata struct {
		Name        *string           `json:"name"`
		DisplayName *string           `json:"displayName"`
		Labels      map[string]string `json:"labels"`
		ExternalID  *string           `json:"externalId"`
	} `json:"metadata"`
	Spec struct {
		Region  *string `json:"region"`
		Runtime struct {
			Image  *string         `json:"image"`
			Memory json.RawMessage `json:"memory"` // MiB
			Envs   []EnvVar        `json:"envs"`
			Ports  []Port          `json:"ports"`
		} `json:"runtime"`
		Volumes []VolumeMount `json:"volumes"`
	} `json:"spec"`
}

// SandboxFailure is the body of an error of POST /sandboxes: the contract has
// another one there than elsewhere, with a word for a code.
type SandboxFailure struct {
	Code        string `json:"code"`
	Error       string `json:"error"` // the same word, where all other errors have it
	Message     string `json:"message"`
	StatusCode  int    `json:"status_code"`
	SandboxName string `json:"sandbox_name,omitempty"`
	Workspace   string `json:"workspace,omitempty"`
	Reason      string `json:"reason,omitempty"` // CREATION_IN_PROGRESS
	Timestamp   string `json:"timestamp"`
}

const createSandboxPattern = "POST /v0/sandboxes"

// sandboxFailure answers err in the shape that this one route has.
func (c *call) sandboxFailure(err error) (word string) {
	b, a := bodyFor(err, c.id)
	f := SandboxFailure{
		Code: b.Error, Error: b.Error, Message: b.Message, StatusCode: a.status, SandboxName: c.resource, Workspace: c.workspace, Timestamp: stamp(c.s.now()),
	}
	if errors.Is(err, ErrSandboxCreating) {
		f.Reason = "CREATION_IN_PROGRESS"
	}
	errorHeaders(c.w.Header(), err, a)
	writeJSON(c.w, a.status, f)
	return f.Error
}

// runtime is the sandbox runtime; ErrMissing where there is none.
func (c *call) runtime() (Sandboxes, error) {
	if c.s.o.Sandboxes == nil {
		return nil, refuse(ErrMissing, "sandboxes are not enabled on this server")
	}
	return c.s.o.Sandboxes, nil
}

func createSandbox(c *call) error {
	r, err := c.runtime()
	if err != nil {
		return err
	}
	var b SandboxRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	name := value(b.Metadata.Name)
	c.resource = clip(name, 64)
	if name != "" && !validName(name) {
		return invalid("metadata.name", nameRule)
	}
	if name == reservedName {
		return invalid("metadata.name", "%q is reserved", reservedName)
	}
	memory, err := mebibytes("spec.runtime.memory", b.Spec.Runtime.Memory)
	if err != nil {
		return err
	}
	n := NewSandbox{
		Workspace: c.workspace, Name: name, DisplayName: value(b.Metadata.DisplayName), ExternalID: value(b.Metadata.ExternalID),
		Labels: b.Metadata.Labels, Region: value(b.Spec.Region), Image: value(b.Spec.Runtime.Image),
		Envs: b.Spec.Runtime.Envs, Ports: b.Spec.Runtime.Ports, Volumes: b.Spec.Volumes, Actor: c.principal.actor(),
	}
	if memory != nil {
		n.MemoryMiB = *memory
	}
	missingOnly, err := flag(c.r.URL.Query(), "createIfNotExist")
	if err != nil {
		return err
	}
	s, err := r.Create(c.r.Context(), n, missingOnly)
	if err != nil {
		return err
	}
	c.resource = s.Metadata.Name
	return c.sandbox(s)
}

// sandbox answers with a sandbox, and where it is reached.
func (c *call) sandbox(s Sandbox) error {
	c.locate(&s)
	return c.json(s)
}

func (c *call) locate(s *Sandbox) {
	s.Metadata.URL = c.base() + "/v0/sandboxes/" + s.Metadata.Name + "/run"
}

func (c *call) pathSandbox() (Sandboxes, string, error) {
	r, err := c.runtime()
	if err != nil {
		return nil, "", err
	}
	name, err := c.pathName("sandbox")
	return r, name, err
}

func getSandbox(c *call) error {
	r, name, err := c.pathSandbox()
	if err != nil {
		return err
	}
	s, err := r.Sandbox(c.workspace, name)
	if err != nil {
		return err
	}
	return c.sandbox(s)
}

func getSandboxByExternalID(c *call) error {
	r, err := c.runtime()
	if err != nil {
		return err
	}
	s, err := r.SandboxByExternalID(c.workspace, c.r.PathValue("externalId"))
	if err != nil {
		return err
	}
	return c.sandbox(s)
}

// updateSandbox is a merge, like a volume's.
func updateSandbox(c *call) error {
	r, name, err := c.pathSandbox()
	if err != nil {
		return err
	}
	var b SandboxRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	if b.Metadata.Name != nil && *b.Metadata.Name != name {
		return invalid("metadata.name", "cannot be changed; the path says %q", name)
	}
	memory, err := mebibytes("spec.runtime.memory", b.Spec.Runtime.Memory)
	if err != nil {
		return err
	}
	s, err := r.Change(c.r.Context(), c.workspace, name, ChangeSandbox{
		DisplayName: b.Metadata.DisplayName, ExternalID: b.Metadata.ExternalID, Labels: b.Metadata.Labels,
		Region: b.Spec.Region, Image: b.Spec.Runtime.Image, MemoryMiB: memory, Volumes: b.Spec.Volumes, Actor: c.principal.actor(),
	})
	if err != nil {
		return err
	}
	return c.sandbox(s)
}

func deleteSandbox(c *call) error {
	r, name, err := c.pathSandbox()
	if err != nil {
		return err
	}
	s, err := r.Delete(c.r.Context(), c.workspace, name, c.principal.actor())
	if err != nil {
		return err
	}
	return c.sandbox(s)
}
