package api

import (
	"errors"
	"unicode/utf8"

	"holdfast/engine"
	"holdfast/templates"
)

// reservedName would hide behind the path of by-external-id.
const reservedName = "by-external-id"

func createVolume(c *call) error {
	key, err := c.idempotencyKey()
	if err != nil {
		return err
	}
	var b VolumeRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	r := engine.CreateVolume{
		Workspace: c.workspace, Actor: c.principal.actor(), IdempotencyKey: key,
		DisplayName: value(b.Metadata.DisplayName), Labels: b.Metadata.Labels, ExternalID: value(b.Metadata.ExternalID),
		Region: value(b.Spec.Region), Template: value(b.Spec.Template), Snapshot: value(b.Spec.Snapshot), Filesystem: value(b.Spec.Filesystem), Pool: value(b.Spec.Pool),
	}
	if b.Metadata.Name != nil {
		r.Name, c.resource = *b.Metadata.Name, clip(*b.Metadata.Name, 64)
		if !validName(r.Name) {
			return invalid("metadata.name", nameRule)
		}
		if r.Name == reservedName {
			return invalid("metadata.name", "%q is reserved", reservedName)
		}
	}
	if r.SizeMiB, err = mebibytes("spec.size", b.Spec.Size); err != nil {
		return err
	}
	v, err := c.s.o.Engine.CreateVolume(c.r.Context(), r)
	if err != nil {
		return badTemplate(err)
	}
	c.resource = v.Name
	if key != "" {
		// Sizes change by themselves, and a replay must give the same bytes.
		return c.json(volumeBody(v, nil))
	}
	return c.volume(v)
}

func value(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// badTemplate makes a missing template the 400 that clients expect of a
// volume's creation, where 404 would be about the volume.
func badTemplate(err error) error {
	var p *engine.Problem
	if errors.As(err, &p) && !errors.Is(p.Kind, engine.ErrNotFound) {
		return err
	}
	if errors.Is(err, templates.ErrNotFound) {
		return invalid("spec.template", "%v", err)
	}
	return err
}

// idempotencyKey reads the header; empty when there is none.
func (c *call) idempotencyKey() (string, error) {
	key := c.r.Header.Get("Idempotency-Key")
	if len(key) > 255 || !utf8.ValidString(key) {
		return "", invalid("Idempotency-Key", "must have at most 255 bytes of UTF-8")
	}
	return key, nil
}

// pathVolume is the volume that the path names.
func (c *call) pathVolume() (engine.Volume, error) {
	name, err := c.pathName("volume")
	if err != nil {
		return engine.Volume{}, err
	}
	return c.s.o.Engine.Volume(c.workspace, name)
}

func getVolume(c *call) error {
	v, err := c.pathVolume()
	if err != nil {
		return err
	}
	return c.volume(v)
}

func getVolumeByExternalID(c *call) error {
	v, err := c.s.o.Engine.VolumeByExternalID(c.workspace, c.r.PathValue("externalId"))
	if err != nil {
		return err
	}
	return c.volume(v)
}

// volume answers with a volume and its sizes. A pool that cannot tell them now
// is no reason to hide the volume.
func (c *call) volume(v engine.Volume) error {
	var sizes *Sizes
	if v.Phase == engine.Ready {
		if s, err := c.s.o.Engine.Sizes(c.r.Context(), v); err == nil {
			sizes = sizesBody(s)
		} else if !errors.Is(err, engine.ErrNotFound) {
			c.s.log.Warn("no sizes of a volume", "request", c.id, "volume", v.Name, "workspace", v.Workspace, "cause", err)
		}
	}
	return c.json(volumeBody(v, sizes))
}

// updateVolume is a merge: what the body does not say keeps its value.
func updateVolume(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	var b VolumeRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	size, err := mebibytes("spec.size", b.Spec.Size)
	if err != nil {
		return err
	}
	if b.Metadata.Name != nil && *b.Metadata.Name != name {
		return invalid("metadata.name", "cannot be changed; the path says %q", name)
	}
	v, err := c.s.o.Engine.ChangeVolume(c.r.Context(), c.workspace, name, engine.ChangeVolume{
		DisplayName: b.Metadata.DisplayName, Labels: b.Metadata.Labels, ExternalID: b.Metadata.ExternalID,
		SizeMiB: size, Region: b.Spec.Region, Template: b.Spec.Template, Filesystem: b.Spec.Filesystem, Snapshot: b.Spec.Snapshot,
		Actor: c.principal.actor(),
	})
	if err != nil {
		return badTemplate(err)
	}
	return c.volume(v)
}

func deleteVolume(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	v, err := c.s.o.Engine.DeleteVolume(c.r.Context(), c.workspace, name, c.principal.actor())
	if err != nil {
		return err
	}
	return c.json(volumeBody(v, nil))
}
