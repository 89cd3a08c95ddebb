package api

import (
	"encoding/json"
	"errors"
	"net/url"
	"strconv"

	"holdfast/templates"
)

// Template is a volume template on the wire.
type Template struct {
	Metadata Metadata          `json:"metadata"`
	Spec     TemplateSpec      `json:"spec"`
	State    TemplateState     `json:"state"`
	Versions []TemplateVersion `json:"versions"`
}

// TemplateSpec is what was asked for; DefaultSize is in MiB.
type TemplateSpec struct {
	DefaultSize int64      `json:"defaultSize,omitempty"`
	Description string     `json:"description,omitempty"`
	Retention   *Retention `json:"retention,omitempty"`
}

// TemplateState sums up the versions. There is no status beside it: clients of
// the contract read this one.
type TemplateState struct {
	Status                string `json:"status"` // created, ready, error
	LatestVersion         string `json:"latestVersion"`
	VersionCount          int    `json:"versionCount"`
	LastVersionUploadedAt string `json:"lastVersionUploadedAt,omitempty"`
}

// TemplateVersion is a revision on the wire. ContentSize is in bytes.
type TemplateVersion struct {
	Name         string      `json:"name"`
	TemplateName string      `json:"templateName"`
	Status       string      `json:"status"` // CREATED, READY, FAILED
	VersionID    string      `json:"versionId"`
	ContentSize  int64       `json:"contentSize"`
	MinimumSize  int64       `json:"minimumSize,omitempty"` // MiB: the smallest volume that holds it
	Entries      int64       `json:"entries,omitempty"`
	Digest       string      `json:"digest,omitempty"`
	Failure      string      `json:"failure,omitempty"`
	Workspace    string      `json:"workspace"`
	CreatedAt    string      `json:"createdAt"`
	CreatedBy    string      `json:"createdBy,omitempty"`
	Number       int         `json:"number"`
	ReadyAt      string      `json:"readyAt,omitempty"`
	VerifiedAt   string      `json:"verifiedAt,omitempty"` // when the image was last held against its digest
	RollbackOf   int         `json:"rollbackOf,omitempty"` // number of the version whose contents these are again
	Pinned       *VersionPin `json:"pinned,omitempty"`
	Damaged      bool        `json:"damaged,omitempty"` // READY once
	// Remote is where its bytes are; absent: in the pool.
	Remote *RemoteVersion `json:"remote,omitempty"`
}

// TemplateRequest is the body of POST and PUT; absent and null fields are not given.
type TemplateRequest struct {
	Metadata struct {
		Name        *string           `json:"name"`
		DisplayName *string           `json:"displayName"`
		Labels      map[string]string `json:"labels"`
	} `json:"metadata"`
	Spec struct {
		DefaultSize json.RawMessage `json:"defaultSize"` // MiB
		Description *string         `json:"description"`
		Retention   *struct {
			Versions *int `json:"versions"`
			Days     *int `json:"days"`
		} `json:"retention"`
	} `json:"spec"`
}

// VersionDeleted is the answer to the deletion of a version.
type VersionDeleted struct {
	Message  string   `json:"message"`
	Template Template `json:"template"`
}

const uploadURLHeader = "X-Blaxel-Upload-Url"

func templateBody(t templates.Template) Template {
	b := Template{
		Metadata: Metadata{
			Name: t.Name, DisplayName: t.DisplayName, Labels: t.Labels, Workspace: t.Workspace,
			CreatedAt: stamp(t.CreatedAt), UpdatedAt: stamp(t.UpdatedAt), CreatedBy: t.CreatedBy, UpdatedBy: t.UpdatedBy,
		},
		Spec:     TemplateSpec{DefaultSize: t.DefaultSizeMiB, Description: t.Description},
		State:    TemplateState{Status: "created", VersionCount: len(t.Revisions)},
		Versions: make([]TemplateVersion, len(t.Revisions)),
	}
	if t.Retention != (templates.Retention{}) {
		b.Spec.Retention = &Retention{Versions: t.Retention.Versions, Days: t.Retention.Days}
	}
	for i, r := range t.Revisions {
		b.Versions[i] = versionBody(r)
		if r.Status == templates.Failed {
			b.State.Status = "error"
		}
	}
	if latest := t.Latest(); latest != nil {
		b.State.Status, b.State.LatestVersion, b.State.LastVersionUploadedAt = "ready", latest.Name, stamp(latest.ReadyAt)
	}
	return b
}

func versionBody(r templates.Revision) TemplateVersion {
	const mib = 1 << 20
	v := TemplateVersion{
		Name: r.Name, TemplateName: r.Template, Status: string(r.Status), VersionID: string(r.ID), ContentSize: r.ContentBytes,
		MinimumSize: (r.MinimumBytes + mib - 1) / mib, Entries: r.Entries, Digest: r.Digest, Failure: r.Failure,
		Workspace: r.Workspace, CreatedAt: stamp(r.CreatedAt), CreatedBy: r.CreatedBy, Number: r.Number,
		ReadyAt: stamp(r.ReadyAt), VerifiedAt: stamp(r.VerifiedAt), RollbackOf: r.RollbackOf, Damaged: r.Damaged,
		Remote: remoteBody(r),
	}
	if r.Pinned != nil {
		v.Pinned = &VersionPin{By: r.Pinned.By, At: stamp(r.Pinned.At)}
	}
	return v
}

func listTemplates(c *call) error {
	all, err := c.s.o.Library.List(c.workspace)
	if err != nil {
		return err
	}
	list := make([]Template, len(all))
	for i, t := range all {
		list[i] = templateBody(t)
	}
	return c.json(list)
}

func getTemplate(c *call) error {
	name, err := c.pathName("volume template")
	if err != nil {
		return err
	}
	t, err := c.s.o.Library.Template(c.workspace, name)
	if err != nil {
		return err
	}
	return c.json(templateBody(t))
}

func createTemplate(c *call) error {
	var b TemplateRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	if b.Metadata.Name == nil {
		return invalid("metadata.name", "is required")
	}
	name := *b.Metadata.Name
	c.resource = clip(name, 64)
	if !validName(name) {
		return invalid("metadata.name", nameRule)
	}
	switch _, err := c.s.o.Library.Template(c.workspace, name); {
	case err == nil:
		return refuse(ErrTemplateExists, "Volume template %s already exists", name)
	case !errors.Is(err, templates.ErrNotFound):
		return err
	}
	return c.putTemplate(name, b)
}

// updateTemplate creates or changes: PUT is how bl deploys.
func updateTemplate(c *call) error {
	name := c.r.PathValue("name")
	if !validName(name) {
		return invalid("metadata.name", nameRule)
	}
	c.resource = name
	var b TemplateRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	if b.Metadata.Name != nil && *b.Metadata.Name != name {
		return invalid("metadata.name", "cannot be changed; the path says %q", name)
	}
	return c.putTemplate(name, b)
}

func (c *call) putTemplate(name string, b TemplateRequest) error {
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return invalid("query", "is not well-formed")
	}
	upload, err := flag(query, "upload")
	if err != nil {
		return err
	}
	change := templates.Change{
		DisplayName: b.Metadata.DisplayName, Labels: b.Metadata.Labels, Description: b.Spec.Description, Actor: c.principal.actor(),
	}
	b.retention(&change)
	if change.DefaultSizeMiB, err = mebibytes("spec.defaultSize", b.Spec.DefaultSize); err != nil {
		return err
	}
	t, _, err := c.s.o.Library.Put(c.r.Context(), c.workspace, name, change, true)
	if err != nil {
		return err
	}
	if upload {
		target, err := c.s.o.Library.BeginUpload(c.r.Context(), c.workspace, name, query.Get("version"), c.principal.actor())
		if err != nil {
			return err
		}
		if t, err = c.s.o.Library.Template(c.workspace, name); err != nil {
			return err
		}
		c.w.Header().Set(uploadURLHeader, c.base()+target)
		c.w.Header().Set(deltaHeader, "1")
	}
	return c.json(templateBody(t))
}

func flag(query url.Values, name string) (bool, error) {
	text := query.Get(name)
	if text == "" {
		return false, nil
	}
	on, err := strconv.ParseBool(text)
	if err != nil {
		return false, invalid(name, "must be true or false")
	}
	return on, nil
}

// base is what a client puts before a path of ours: as configured, or as it
// reached us.
func (c *call) base() string {
	switch {
	case c.s.o.PublicURL != "" && !c.local:
		return c.s.o.PublicURL
	case c.r.TLS != nil:
		return "https://" + c.r.Host
	default:
		return "http://" + c.r.Host
	}
}

func deleteTemplate(c *call) error {
	name, err := c.pathName("volume template")
	if err != nil {
		return err
	}
	t, err := c.s.o.Library.Delete(c.r.Context(), c.workspace, name, c.principal.actor())
	if err != nil {
		return err
	}
	return c.json(templateBody(t))
}

func deleteVersion(c *call) error {
	name, err := c.pathName("volume template")
	if err != nil {
		return err
	}
	version := c.r.PathValue("version")
	t, err := c.s.o.Library.DeleteRevision(c.r.Context(), c.workspace, name, version, c.principal.actor())
	if err != nil {
		return err
	}
	c.resource = name + ":" + clip(version, 64)
	return c.json(VersionDeleted{Message: "Version " + version + " deleted", Template: templateBody(t)})
}
