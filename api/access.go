package api

import (
	"errors"
	"regexp"
	"slices"
	"strings"
)

// authenticate finds the principal and the workspace of a call, and holds them
// against what the route demands.
func (c *call) authenticate() error {
	if err := c.identify(); err != nil {
		return err
	}
	if err := c.throttle(); err != nil {
		return err
	}
	if (c.route.scope == onNode || c.route.scope == byOperator) && !c.principal.ControlPlane {
		return refuse(ErrForbidden, "this needs a control-plane key")
	}
	if c.principal.Role.rank() < c.route.role.rank() {
		return refuse(ErrForbidden, "this needs the role %s; the key has %s", c.route.role, c.principal.Role)
	}
	if c.route.scope == onNode {
		return nil
	}
	return c.chooseWorkspace()
}

// localPrincipal is whoever may open the unix socket.
var localPrincipal = Principal{KeyID: "local", Name: "local", Role: Admin, ControlPlane: true}

func (c *call) identify() error {
	if c.local {
		c.principal = localPrincipal
		return nil
	}
	p, err := c.s.o.Auth.Authenticate(c.r)
	if err == nil {
		c.principal = p
		return nil
	}
	return c.denied(err)
}

// denied counts a failed authentication.
func (c *call) denied(err error) error {
	if !errors.Is(err, ErrUnauthorized) {
		return err
	}
	c.s.metrics.denied.Inc()
	// Valid keys are never in the way of this limit: an address may be shared.
	if ok, after := c.s.failures.take(address(c.r)); !ok {
		return &fault{kind: ErrTooMany, message: "too many failed authentications from this address", after: after}
	}
	return err
}

func (c *call) throttle() error {
	if c.local {
		return nil
	}
	if ok, after := c.s.keys.take(c.principal.KeyID); !ok {
		return &fault{kind: ErrTooMany, message: "this key's request rate is used up", after: after}
	}
	return nil
}

// chooseWorkspace settles the workspace: the one asked for, which a key of
// another workspace may not have, or the key's own.
func (c *call) chooseWorkspace() error {
	asked := slices.Compact(slices.DeleteFunc(
		append(c.r.Header.Values("X-Blaxel-Workspace"), c.r.URL.Query()["workspace"]...),
		func(s string) bool { return strings.TrimSpace(s) == "" }))
	switch {
	case len(asked) > 1:
		return invalid("workspace", "X-Blaxel-Workspace and ?workspace= name different workspaces")
	case len(asked) == 0 && c.principal.Workspace == "" && c.route.scope == mayNameWorkspace:
	case len(asked) == 0 && c.principal.Workspace == "":
		return invalid("workspace", "name one in the header X-Blaxel-Workspace or in ?workspace=")
	case len(asked) == 0:
		c.workspace = c.principal.Workspace
	case asked[0] != c.principal.Workspace && !c.principal.ControlPlane:
		return refuse(ErrForbidden, "the key has no rights in this workspace")
	case !validName(asked[0]):
		return invalid("workspace", nameRule)
	default:
		c.workspace = asked[0]
	}
	if c.principal.ControlPlane && c.workspace != "" {
		_, err := c.s.o.Auth.Workspace(c.workspace)
		return err
	}
	return nil
}

const nameRule = "1 to 49 characters a-z, 0-9 and -, beginning and ending with a letter or digit"

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,47}[a-z0-9])?$`)

func validName(s string) bool { return nameForm.MatchString(s) }

// pathName is the name in the path. An invalid one names nothing: 404, the same
// as a name that is free or another workspace's.
func (c *call) pathName(what string) (string, error) {
	name := c.r.PathValue("name")
	if !validName(name) {
		return "", refuse(ErrMissing, "%s %q not found", what, clip(name, 64))
	}
	c.resource = name
	return name, nil
}
