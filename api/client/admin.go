package client

import (
	"context"
	"net/url"
	"strconv"
	"time"
)

// Key is an API key as it is listed: without its secret.
type Key struct {
	ID           string    `json:"id"`
	Name         string    `json:"name,omitempty"`
	Prefix       string    `json:"prefix,omitempty"`
	Workspace    string    `json:"workspace,omitempty"`
	Role         string    `json:"role,omitempty"` // reader, writer, admin
	ControlPlane bool      `json:"controlPlane,omitempty"`
	CreatedAt    time.Time `json:"createdAt,omitzero"`
	CreatedBy    string    `json:"createdBy,omitempty"`
	ExpiresAt    time.Time `json:"expiresAt,omitzero"`
	RevokedAt    time.Time `json:"revokedAt,omitzero"`
}

// NewKey asks for a key.
type NewKey struct {
	Name         string    `json:"name,omitempty"`
	Workspace    string    `json:"workspace,omitempty"`
	Role         string    `json:"role,omitempty"`
	ControlPlane bool      `json:"controlPlane,omitempty"`
	ExpiresAt    time.Time `json:"expiresAt,omitzero"`
}

// CreatedKey is a new key with its secret, which is never shown again.
type CreatedKey struct {
	Key
	Secret string `json:"secret"`
}

// CreateKey makes a key.
func (c *Client) CreateKey(ctx context.Context, k NewKey) (CreatedKey, error) {
	var out CreatedKey
	err := c.do(ctx, call{method: "POST", path: []string{"keys"}, body: k}, &out)
	return out, err
}

// Keys lists keys.
func (c *Client) Keys(ctx context.Context) ([]Key, error) {
	var out []Key
	err := c.do(ctx, call{method: "GET", path: []string{"keys"}}, &out)
	return out, err
}

// RevokeKey ends a key, within a second.
func (c *Client) RevokeKey(ctx context.Context, id string) (Key, error) {
	var out Key
	err := c.do(ctx, call{method: "DELETE", path: []string{"keys", id}}, &out)
	return out, err
}

// Workspace is a tenant.
type Workspace struct {
	Name      string    `json:"name"`
	CreatedAt time.Time `json:"createdAt,omitzero"`
	Quota     Quota     `json:"quota"`
}

// Quota bounds a workspace; 0 is no bound.
type Quota struct {
	Volumes    int64 `json:"volumes"`
	MiB        int64 `json:"mib"`
	LargestMiB int64 `json:"largestMiB"`
	Snapshots  int64 `json:"snapshots"`
}

// CreateWorkspace makes a workspace.
func (c *Client) CreateWorkspace(ctx context.Context, name string) (Workspace, error) {
	var out Workspace
	err := c.do(ctx, call{method: "POST", path: []string{"workspaces"}, body: map[string]string{"name": name}}, &out)
	return out, err
}

// Workspaces lists all.
func (c *Client) Workspaces(ctx context.Context) ([]Workspace, error) {
	var out []Workspace
	err := c.do(ctx, call{method: "GET", path: []string{"workspaces"}}, &out)
	return out, err
}

// Workspace finds one.
func (c *Client) Workspace(ctx context.Context, name string) (Workspace, error) {
	var out Workspace
	err := c.do(ctx, call{method: "GET", path: []string{"workspaces", name}}, &out)
	return out, err
}

// SetQuota replaces a workspace's bounds.
func (c *Client) SetQuota(ctx context.Context, workspace string, q Quota) (Quota, error) {
	var out Quota
	err := c.do(ctx, call{method: "PUT", path: []string{"workspaces", workspace, "quota"}, body: q}, &out)
	return out, err
}

// Quota tells a workspace's bounds.
func (c *Client) Quota(ctx context.Context, workspace string) (Quota, error) {
	var out Quota
	err := c.do(ctx, call{method: "GET", path: []string{"workspaces", workspace, "quota"}}, &out)
	return out, err
}

// Pool is a pool's space and promises, in bytes.
type Pool struct {
	Name        string       `json:"name"`
	Backend     string       `json:"backend"`
	Unavailable string       `json:"unavailable,omitempty"` // why it is not open
	Total       int64        `json:"total"`
	Free        int64        `json:"free"`
	Allocated   int64        `json:"allocated"`
	Trash       int64        `json:"trash"`
	Provisioned int64        `json:"provisioned"`
	Other       int64        `json:"other"`
	Reserve     int64        `json:"reserve"`
	Ratio       float64      `json:"overprovision"`
	Available   int64        `json:"available"`
	Shared      int64        `json:"shared"`
	Volumes     int          `json:"volumes"`
	Quarantined []Quarantine `json:"quarantined,omitempty"`
}

// Quarantine is something in a pool that nothing explains.
type Quarantine struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
	Bytes  int64  `json:"bytes"`
}

// Pools lists the node's pools.
func (c *Client) Pools(ctx context.Context) ([]Pool, error) {
	var out []Pool
	err := c.do(ctx, call{method: "GET", path: []string{"pools"}}, &out)
	return out, err
}

// Check is one thing that the node looked at.
type Check struct {
	Name        string `json:"name"`
	Status      string `json:"status"` // ok, warn, fail
	Found       string `json:"found"`
	Consequence string `json:"consequence,omitempty"`
	Fix         string `json:"fix,omitempty"`
}

// Doctor asks the node what it has and lacks.
func (c *Client) Doctor(ctx context.Context) ([]Check, error) {
	var out []Check
	err := c.do(ctx, call{method: "GET", path: []string{"doctor"}}, &out)
	return out, err
}

// AuditEntry is one mutation that somebody asked for.
type AuditEntry struct {
	Time      time.Time `json:"time"`
	Request   string    `json:"request"`
	Workspace string    `json:"workspace,omitempty"`
	KeyID     string    `json:"keyId,omitempty"`
	Principal string    `json:"principal,omitempty"`
	Action    string    `json:"action"`
	Resource  string    `json:"resource,omitempty"`
	Remote    string    `json:"remote,omitempty"`
	Status    int       `json:"status"`
	Error     string    `json:"error,omitempty"`
}

// Audit gives the newest entries, newest first.
func (c *Client) Audit(ctx context.Context, limit int) ([]AuditEntry, error) {
	var out []AuditEntry
	q := url.Values{}
	if limit > 0 {
		q.Set("limit", strconv.Itoa(limit))
	}
	err := c.do(ctx, call{method: "GET", path: []string{"audit"}, query: q}, &out)
	return out, err
}
