package client

import (
	"context"
	"time"
)

// Retention says how long READY versions are kept; 0: as the node has it.
type Retention struct {
	Versions int `json:"versions,omitempty"`
	Days     int `json:"days,omitempty"`
}

// VersionPin says who keeps a version from being removed.
type VersionPin struct {
	By string    `json:"by,omitempty"`
	At time.Time `json:"at,omitzero"`
}

// TemplateHistory is a template's versions with what they cost and who uses them.
type TemplateHistory struct {
	Name     string           `json:"name"`
	Versions []HistoryVersion `json:"versions"` // oldest first
	Events   []TemplateEvent  `json:"events"`
}

// HistoryVersion is a version and its use.
type HistoryVersion struct {
	TemplateVersion
	ImageSize int64 `json:"imageSize"` // bytes
	Sources   []struct {
		Filesystem string `json:"filesystem"`
		Size       int64  `json:"size"` // MiB
	} `json:"sources"`
	Volumes struct {
		Count int      `json:"count"`
		Names []string `json:"names"` // the first ones
	} `json:"volumes"`
}

// TemplateEvent is something that happened to a template without being asked for.
type TemplateEvent struct {
	Time    time.Time `json:"time"`
	Type    string    `json:"type"` // retired, damaged, restored
	Version string    `json:"version"`
	Message string    `json:"message"`
}

// TemplateHistory tells a template's versions, and what uses each.
func (c *Client) TemplateHistory(ctx context.Context, name string) (TemplateHistory, error) {
	var out TemplateHistory
	err := c.do(ctx, call{method: "GET", path: []string{"volume_templates", name, "history"}}, &out)
	return out, err
}

// RollbackTemplate makes an older version the newest again, as a new version.
func (c *Client) RollbackTemplate(ctx context.Context, name, version string) (TemplateVersion, error) {
	var out TemplateVersion
	body := map[string]string{"version": version}
	err := c.do(ctx, call{method: "POST", path: []string{"volume_templates", name, "rollback"}, body: body}, &out)
	return out, err
}

// PinTemplateVersion keeps a version from being removed, UnpinTemplateVersion no
// longer.
func (c *Client) PinTemplateVersion(ctx context.Context, name, version string) (TemplateVersion, error) {
	return c.version(ctx, "PUT", name, version, "pin")
}

// UnpinTemplateVersion takes a pin away.
func (c *Client) UnpinTemplateVersion(ctx context.Context, name, version string) (TemplateVersion, error) {
	return c.version(ctx, "DELETE", name, version, "pin")
}

// VerifyTemplateVersion lets the server hold a version's image against its
// digest; Status says what came out.
func (c *Client) VerifyTemplateVersion(ctx context.Context, name, version string) (TemplateVersion, error) {
	return c.version(ctx, "POST", name, version, "verify")
}

func (c *Client) version(ctx context.Context, method, name, version, what string) (TemplateVersion, error) {
	var out TemplateVersion
	err := c.do(ctx, call{method: method, path: []string{"volume_templates", name, "versions", version, what}}, &out)
	return out, err
}

// SetRetention changes how long versions of a template are kept; nil fields stay.
func (c *Client) SetRetention(ctx context.Context, name string, versions, days *int) (Template, error) {
	retention := map[string]int{}
	if versions != nil {
		retention["versions"] = *versions
	}
	if days != nil {
		retention["days"] = *days
	}
	body := map[string]any{"spec": map[string]any{"retention": retention}}
	var out Template
	err := c.do(ctx, call{method: "PUT", path: []string{"volume_templates", name}, body: body}, &out)
	return out, err
}
