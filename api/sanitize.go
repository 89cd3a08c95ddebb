package api

import (
	"context"
	"net/http"
	"time"

	"holdfast/engine"
)

// SanitizeRequest is the body of POST.
type SanitizeRequest struct {
	Name string `json:"name"` // of the new volume
	Size int64  `json:"size"` // MiB; 0: the old one's
}

// sanitizeVolume makes a volume of the files of another one that a guest has written.
func sanitizeVolume(c *call) error {
	name, err := c.pathName("volume")
	if err != nil {
		return err
	}
	_ = http.NewResponseController(c.w.ResponseWriter).SetReadDeadline(time.Now().Add(c.s.o.Limits.Request))
	var b SanitizeRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	switch {
	case !validName(b.Name):
		return invalid("name", nameRule)
	case b.Name == reservedName:
		return invalid("name", "%q is reserved", reservedName)
	case b.Size < 0:
		return invalid("size", "must be a whole number of MB, at least 1")
	}
	ctx, cancel := context.WithTimeout(c.r.Context(), c.s.o.Limits.Import)
	defer cancel()
	v, err := c.s.o.Engine.SanitizeVolume(ctx, c.workspace, name, engine.SanitizeVolume{Name: b.Name, SizeMiB: b.Size, Actor: c.principal.actor()})
	if err != nil {
		return err
	}
	c.resource = name + " as " + v.Name
	c.extendWrite()
	return c.volume(v)
}
