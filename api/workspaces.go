package api

import (
	"bytes"
	"encoding/json"
	"strconv"
	"unicode/utf8"
)

func (c *call) workspaceBody(w Workspace) WorkspaceBody {
	name := w.DisplayName
	if name == "" {
		name = w.Name
	}
	return WorkspaceBody{
		ID: w.ID, Name: w.Name, DisplayName: name, CreatedAt: stamp(w.CreatedAt), UpdatedAt: stamp(w.UpdatedAt), Status: "ready",
		Quota: QuotaBody(c.s.o.Engine.Quota(w.Name)),
	}
}

// pathWorkspace finds the workspace in the path. Another one's and a missing
// one are the same 404 to a workspace's key.
func (c *call) pathWorkspace() (Workspace, error) {
	name := c.r.PathValue("name")
	missing := refuse(ErrMissing, "workspace %q not found", clip(name, 64))
	if !validName(name) || !c.principal.ControlPlane && name != c.principal.Workspace {
		return Workspace{}, missing
	}
	c.resource = name
	return c.s.o.Auth.Workspace(name)
}

func listWorkspaces(c *call) error {
	all, err := c.s.o.Auth.Workspaces()
	if err != nil {
		return err
	}
	list := []WorkspaceBody{}
	for _, w := range all {
		if c.principal.ControlPlane || w.Name == c.principal.Workspace {
			list = append(list, c.workspaceBody(w))
		}
	}
	return c.json(list)
}

func getWorkspace(c *call) error {
	w, err := c.pathWorkspace()
	if err != nil {
		return err
	}
	return c.json(c.workspaceBody(w))
}

type workspaceRequest struct {
	Name        *string `json:"name"`
	DisplayName *string `json:"displayName"`
}

func createWorkspace(c *call) error {
	var b workspaceRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	if b.Name == nil {
		return invalid("name", "is required")
	}
	return c.putWorkspace(*b.Name, b)
}

func updateWorkspace(c *call) error {
	var b workspaceRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	name := c.r.PathValue("name")
	if b.Name != nil && *b.Name != name {
		return invalid("name", "cannot be changed; the path says %q", clip(name, 64))
	}
	return c.putWorkspace(name, b)
}

// putWorkspace makes it so: the workspace is there, with this display name.
func (c *call) putWorkspace(name string, b workspaceRequest) error {
	c.resource = clip(name, 64)
	if !validName(name) {
		return invalid("name", nameRule)
	}
	if b.DisplayName != nil && utf8.RuneCountInString(*b.DisplayName) > maxDisplayName {
		return invalid("displayName", "must have at most %d characters", maxDisplayName)
	}
	w, err := c.s.o.Auth.PutWorkspace(c.r.Context(), name, b.DisplayName, c.principal.actor())
	if err != nil {
		return err
	}
	return c.json(c.workspaceBody(w))
}

func getQuota(c *call) error {
	w, err := c.pathWorkspace()
	if err != nil {
		return err
	}
	return c.json(QuotaBody(c.s.o.Engine.Quota(w.Name)))
}

// updateQuota is a merge, like every PUT: absent and null bounds keep their value.
func updateQuota(c *call) error {
	w, err := c.pathWorkspace()
	if err != nil {
		return err
	}
	var b quotaRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	q := c.s.o.Engine.Quota(w.Name)
	for _, f := range []struct {
		name string
		raw  json.RawMessage
		to   *int64
	}{{"volumes", b.Volumes, &q.Volumes}, {"mib", b.MiB, &q.MiB}, {"largestMiB", b.LargestMiB, &q.LargestMiB}, {"snapshots", b.Snapshots, &q.Snapshots}} {
		if err := bound(f.name, f.raw, f.to); err != nil {
			return err
		}
	}
	if err := c.s.o.Engine.SetQuota(c.r.Context(), w.Name, q); err != nil {
		return err
	}
	return c.json(QuotaBody(q))
}

func bound(field string, raw json.RawMessage, to *int64) error {
	text := string(bytes.TrimSpace(raw))
	if text == "" || text == "null" {
		return nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || n > maxMiB {
		return invalid(field, "must be a whole number from 0 (no bound) to %d, not %s", int64(maxMiB), clip(text, 32))
	}
	*to = n
	return nil
}
