package client

import (
	"context"
	"net/url"
	"time"
)

// Sandbox is a container on the server's machine with its volumes.
type Sandbox struct {
	Metadata SandboxMetadata `json:"metadata"`
	Spec     SandboxSpec     `json:"spec"`
	Events   []VolumeEvent   `json:"events,omitempty"`
	Status   string          `json:"status,omitempty"` // DEPLOYING, DEPLOYED, FAILED, DELETING
}

// SandboxMetadata names a sandbox and says where its processes and files are.
type SandboxMetadata struct {
	VolumeMetadata

	URL string `json:"url,omitempty"`
}

// SandboxSpec is what is asked for.
type SandboxSpec struct {
	Region  string         `json:"region,omitempty"`
	Runtime SandboxRuntime `json:"runtime"`
	Volumes []VolumeMount  `json:"volumes,omitempty"`
}

// SandboxRuntime is how a sandbox runs.
type SandboxRuntime struct {
	Image  string   `json:"image,omitempty"`
	Memory int64    `json:"memory,omitempty"` // MiB
	Envs   []EnvVar `json:"envs,omitempty"`
}

// EnvVar is a variable of every process of a sandbox.
type EnvVar struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// VolumeMount is a volume in a sandbox.
type VolumeMount struct {
	Name      string `json:"name"`
	MountPath string `json:"mountPath"`
	ReadOnly  bool   `json:"readOnly"`
	Type      string `json:"type,omitempty"`   // persistent (default), ephemeral
	SizeMB    int64  `json:"sizeMb,omitempty"` // MiB, of an ephemeral one
}

// Exec asks for a process in a sandbox.
type Exec struct {
	Command string            `json:"command"`
	Dir     string            `json:"workingDir,omitempty"`
	Env     map[string]string `json:"env,omitempty"`
	Timeout float64           `json:"timeout,omitempty"` // seconds
	Wait    bool              `json:"waitForCompletion"`
}

// Process is a process in a sandbox and what it has written.
type Process struct {
	PID         string `json:"pid"`
	Name        string `json:"name"`
	Command     string `json:"command"`
	Status      string `json:"status"` // running, completed, failed, stopped, killed
	ExitCode    int    `json:"exitCode"`
	Stdout      string `json:"stdout"`
	Stderr      string `json:"stderr"`
	Truncated   bool   `json:"truncated,omitempty"`
	StartedAt   string `json:"startedAt"`
	CompletedAt string `json:"completedAt"`
}

// CreateSandbox makes a sandbox, usable on return.
func (c *Client) CreateSandbox(ctx context.Context, s Sandbox) (Sandbox, error) {
	var out Sandbox
	err := c.do(ctx, call{method: "POST", path: []string{"sandboxes"}, body: s}, &out)
	return out, err
}

// Sandboxes lists the workspace's sandboxes, the newest first.
func (c *Client) Sandboxes(ctx context.Context) ([]Sandbox, error) {
	var all []Sandbox
	for cursor := ""; ; {
		var page struct {
			Data []Sandbox `json:"data"`
			Meta struct {
				NextCursor string `json:"nextCursor"`
			} `json:"meta"`
		}
		query := url.Values{"limit": {"200"}}
		if cursor != "" {
			query.Set("cursor", cursor)
		}
		if err := c.do(ctx, call{method: "GET", path: []string{"sandboxes"}, query: query}, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Data...)
		if cursor = page.Meta.NextCursor; cursor == "" {
			return all, nil
		}
	}
}

// Sandbox finds one.
func (c *Client) Sandbox(ctx context.Context, name string) (Sandbox, error) {
	var out Sandbox
	err := c.do(ctx, call{method: "GET", path: []string{"sandboxes", name}}, &out)
	return out, err
}

// DeleteSandbox deletes one; it is gone soon after, see AwaitSandboxGone.
func (c *Client) DeleteSandbox(ctx context.Context, name string) (Sandbox, error) {
	var out Sandbox
	err := c.do(ctx, call{method: "DELETE", path: []string{"sandboxes", name}}, &out)
	return out, err
}

// AwaitSandboxGone waits until a sandbox that is being deleted is gone and its
// volumes are free.
func (c *Client) AwaitSandboxGone(ctx context.Context, name string) error {
	for {
		_, err := c.Sandbox(ctx, name)
		if IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Exec runs a command by a sandbox's shell.
func (c *Client) Exec(ctx context.Context, sandbox string, e Exec) (Process, error) {
	var out Process
	err := c.do(ctx, call{method: "POST", path: []string{"sandboxes", sandbox, "run", "process"}, body: e}, &out)
	return out, err
}

// Process finds a process of a sandbox by pid or name.
func (c *Client) Process(ctx context.Context, sandbox, id string) (Process, error) {
	var out Process
	err := c.do(ctx, call{method: "GET", path: []string{"sandboxes", sandbox, "run", "process", id}}, &out)
	return out, err
}
