package api

import (
	"holdfast/templates"
)

// Retention says how long READY versions are kept; 0 or absent: as the node has it.
type Retention struct {
	Versions int `json:"versions,omitempty"`
	Days     int `json:"days,omitempty"`
}

// VersionPin says who keeps a version from being removed.
type VersionPin struct {
	By string `json:"by,omitempty"`
	At string `json:"at"`
}

// TemplateHistory is a template's versions with what they cost and who uses them.
type TemplateHistory struct {
	Name     string           `json:"name"`
	Versions []HistoryVersion `json:"versions"` // oldest first
	Events   []TemplateEvent  `json:"events"`   // the last ones, oldest first
}

// HistoryVersion is a version and its use.
type HistoryVersion struct {
	TemplateVersion
	ImageSize int64          `json:"imageSize"` // bytes
	Sources   []SourceInfo   `json:"sources"`   // cached images that volumes are cloned from
	Volumes   VersionVolumes `json:"volumes"`   // made from it
}

// SourceInfo is a cached image; Size is in MiB.
type SourceInfo struct {
	Filesystem string `json:"filesystem"`
	Size       int64  `json:"size"`
}

// VersionVolumes names the first of the volumes that were made from a version.
type VersionVolumes struct {
	Count int      `json:"count"`
	Names []string `json:"names"`
}

// TemplateEvent is something that happened without being asked for.
type TemplateEvent struct {
	Time    string `json:"time"`
	Type    string `json:"type"` // retired, damaged, restored
	Version string `json:"version"`
	Message string `json:"message"`
}

// namedVolumes is how many volumes of a version are named.
const namedVolumes = 20

func templateHistory(c *call) error {
	name, err := c.pathName("volume template")
	if err != nil {
		return err
	}
	t, err := c.s.o.Library.Template(c.workspace, name)
	if err != nil {
		return err
	}
	made, sources := c.s.o.Engine.VolumesOf(c.workspace), c.s.o.Library.Sources()
	h := TemplateHistory{Name: t.Name, Versions: make([]HistoryVersion, len(t.Revisions)), Events: make([]TemplateEvent, len(t.Events))}
	for i, r := range t.Revisions {
		v := HistoryVersion{TemplateVersion: versionBody(r), ImageSize: r.ImageBytes, Sources: []SourceInfo{}}
		for _, s := range sources[r.ID] {
			v.Sources = append(v.Sources, SourceInfo{Filesystem: string(s.Filesystem), Size: s.Size >> 20})
		}
		names := made[r.ID]
		v.Volumes = VersionVolumes{Count: len(names), Names: append([]string{}, names[:min(len(names), namedVolumes)]...)}
		h.Versions[i] = v
	}
	for i, e := range t.Events {
		h.Events[i] = TemplateEvent{Time: stamp(e.Time), Type: string(e.Type), Version: e.Version, Message: e.Message}
	}
	return c.json(h)
}

// RollbackRequest is the body of a rollback.
type RollbackRequest struct {
	Version *string `json:"version"`
}

func rollbackTemplate(c *call) error {
	name, err := c.pathName("volume template")
	if err != nil {
		return err
	}
	var b RollbackRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	if value(b.Version) == "" {
		return invalid("version", "is required: the version to make the newest again")
	}
	r, err := c.s.o.Library.Rollback(c.r.Context(), c.workspace, name, *b.Version, c.principal.actor())
	if err != nil {
		return err
	}
	c.resource = name + ":" + r.Name
	return c.json(versionBody(r))
}

// pathVersion is the template and the version in the path.
func (c *call) pathVersion() (name, version string, err error) {
	name, err = c.pathName("volume template")
	if err != nil {
		return "", "", err
	}
	version = c.r.PathValue("version")
	c.resource = name + ":" + clip(version, 64)
	return name, version, nil
}

func pinVersion(c *call) error {
	name, version, err := c.pathVersion()
	if err != nil {
		return err
	}
	r, err := c.s.o.Library.Pin(c.r.Context(), c.workspace, name, version, c.principal.actor())
	if err != nil {
		return err
	}
	return c.json(versionBody(r))
}

func unpinVersion(c *call) error {
	name, version, err := c.pathVersion()
	if err != nil {
		return err
	}
	r, err := c.s.o.Library.Unpin(c.r.Context(), c.workspace, name, version, c.principal.actor())
	if err != nil {
		return err
	}
	return c.json(versionBody(r))
}

// verifyVersion reads a whole image, which takes as long as it takes.
func verifyVersion(c *call) error {
	name, version, err := c.pathVersion()
	if err != nil {
		return err
	}
	r, err := c.s.o.Library.Verify(c.r.Context(), c.workspace, name, version)
	if err != nil {
		return err
	}
	c.extendWrite()
	return c.json(versionBody(r))
}

// retention reads what a PUT or POST says of it.
func (b TemplateRequest) retention(c *templates.Change) {
	if r := b.Spec.Retention; r != nil {
		c.KeepVersions, c.KeepDays = r.Versions, r.Days
	}
}
