package sandbox

import (
	"crypto/rand"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"time"

	"holdfast/api"
	"holdfast/metadata"
)

// phase names the next step of a sandbox.
type phase string

const (
	deploying phase = "deploying" // the wish is recorded; it is being made
	deployed  phase = "deployed"
	failed    phase = "failed"   // its first process has ended, or it was never whole; its volumes are free
	deleting  phase = "deleting" // it is being taken away
)

func (p phase) status() string { return strings.ToUpper(string(p)) }

// record is a sandbox in the metadata.
type record struct {
	ID          string            `json:"id"` // of the container: "sbx-" and 20 hex digits
	Workspace   string            `json:"workspace"`
	Name        string            `json:"name"`
	DisplayName string            `json:"displayName,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	ExternalID  string            `json:"externalId,omitempty"`
	Region      string            `json:"region"`
	Image       string            `json:"image"`
	MemoryMiB   int64             `json:"memoryMiB"`
	Envs        []api.EnvVar      `json:"envs,omitempty"`
	Ports       []api.Port        `json:"ports,omitempty"`
	Volumes     []mount           `json:"volumes,omitempty"`
	Phase       phase             `json:"phase"`
	Slot        int               `json:"slot"` // which range of users it has
	First       member            `json:"first"`
	ImageEnv    []string          `json:"imageEnv,omitempty"`
	Dir         string            `json:"dir"` // where commands run that name no directory
	Events      []event           `json:"events,omitempty"`
	CreatedAt   time.Time         `json:"createdAt"`
	UpdatedAt   time.Time         `json:"updatedAt"`
	CreatedBy   string            `json:"createdBy,omitempty"`
	UpdatedBy   string            `json:"updatedBy,omitempty"`
}

// mount is a volume of a sandbox.
type mount struct {
	api.VolumeMount

	Volume string `json:"volume"` // its name in the workspace; of an ephemeral one made here
}

func (m mount) ephemeral() bool { return m.Type == ephemeral }

const (
	persistent = "persistent"
	ephemeral  = "ephemeral"
)

type event struct {
	Type    string    `json:"type"`
	Status  string    `json:"status"`
	Message string    `json:"message"`
	Time    time.Time `json:"time"`
}

// maxEvents are kept of a sandbox, the newest.
const maxEvents = 20

var sandboxesTable = metadata.Table[record]{Name: "sandboxes"}

func newID() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails
	return "sbx-" + hex.EncodeToString(b[:])
}

// holder is how the sandbox shows at its volumes.
func (r record) holder() string { return "sandbox:" + r.Name }

func (r record) clone() record {
	r.Labels, r.Envs, r.Ports, r.Volumes, r.Events = maps.Clone(r.Labels), slices.Clone(r.Envs), slices.Clone(r.Ports), slices.Clone(r.Volumes), slices.Clone(r.Events)
	return r
}

// happened notes an event with the phase that the record has now.
func (r *record) happened(now time.Time, kind, message string) {
	r.UpdatedAt = now
	r.Events = append(r.Events, event{kind, r.Phase.status(), message, now})
	r.Events = r.Events[max(0, len(r.Events)-maxEvents):]
}

// show is the sandbox on the wire; where it is reached is for the API to say.
func (r record) show() api.Sandbox {
	s := api.Sandbox{
		Metadata: api.SandboxMetadata{Metadata: api.Metadata{
			Name: r.Name, DisplayName: r.DisplayName, Labels: r.Labels, ExternalID: r.ExternalID, Workspace: r.Workspace,
			CreatedAt: stamp(r.CreatedAt), UpdatedAt: stamp(r.UpdatedAt), CreatedBy: r.CreatedBy, UpdatedBy: r.UpdatedBy,
		}},
		Spec:   api.SandboxSpec{Region: r.Region, Runtime: api.SandboxRuntime{Image: r.Image, Memory: r.MemoryMiB, Envs: r.Envs, Ports: r.Ports}},
		Events: []api.Event{}, Status: r.Phase.status(),
	}
	if r.Phase == deployed {
		s.State = "RUNNING"
	}
	for _, m := range r.Volumes {
		s.Spec.Volumes = append(s.Spec.Volumes, m.VolumeMount)
	}
	for _, e := range r.Events {
		s.Events = append(s.Events, api.Event{Type: e.Type, Status: e.Status, Message: e.Message, Time: stamp(e.Time)})
	}
	return s
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}
