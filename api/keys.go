package api

import (
	"encoding/json"
	"mime"
	"net/url"
	"time"
	"unicode/utf8"
)

// KeyBody is an API key on the wire, without its secret.
type KeyBody struct {
	ID           string `json:"id"`
	Name         string `json:"name"`
	Prefix       string `json:"prefix,omitempty"`
	Workspace    string `json:"workspace"`
	Role         Role   `json:"role"`
	ControlPlane bool   `json:"controlPlane"`
	CreatedAt    string `json:"createdAt"`
	CreatedBy    string `json:"createdBy,omitempty"`
	ExpiresAt    string `json:"expiresAt,omitempty"`
	RevokedAt    string `json:"revokedAt,omitempty"`
}

// CreatedKey is a new key with its secret, which is shown here and never again.
type CreatedKey struct {
	KeyBody
	Secret string `json:"secret"`
}

// KeyRequest is the body of POST.
type KeyRequest struct {
	Name         string `json:"name"`
	Workspace    string `json:"workspace"`
	Role         Role   `json:"role"`
	ControlPlane bool   `json:"controlPlane"`
	ExpiresAt    string `json:"expiresAt"` // RFC 3339; empty: never
}

func keyBody(k Key) KeyBody {
	return KeyBody{
		ID: k.ID, Name: k.Name, Prefix: k.Prefix, Workspace: k.Workspace, Role: k.Role, ControlPlane: k.ControlPlane,
		CreatedAt: stamp(k.CreatedAt), CreatedBy: k.CreatedBy, ExpiresAt: stamp(k.ExpiresAt), RevokedAt: stamp(k.RevokedAt),
	}
}

// maxDisplayName is in characters, as for volumes.
const maxDisplayName = 63

func createKey(c *call) error {
	b := KeyRequest{Role: Writer}
	if err := c.decode(&b); err != nil {
		return err
	}
	c.resource = clip(b.Name, 64)
	expires, err := c.future("expiresAt", b.ExpiresAt)
	switch {
	case err != nil:
		return err
	case b.Role.rank() == 0:
		return invalid("role", "must be reader, writer or admin")
	case utf8.RuneCountInString(b.Name) > maxDisplayName:
		return invalid("name", "must have at most %d characters", maxDisplayName)
	case b.ControlPlane && !c.principal.ControlPlane:
		return refuse(ErrForbidden, "only a control-plane principal makes control-plane keys")
	case b.Workspace != "" && b.Workspace != c.workspace && !c.principal.ControlPlane:
		return refuse(ErrForbidden, "the key has no rights in this workspace")
	case b.Workspace == "" && !b.ControlPlane:
		b.Workspace = c.workspace
	}
	if !b.ControlPlane && b.Workspace == "" {
		return invalid("workspace", "name one, or make a control-plane key")
	}
	if b.Workspace != "" {
		if !validName(b.Workspace) {
			return invalid("workspace", nameRule)
		}
		c.workspace = b.Workspace
	}
	k, secret, err := c.s.o.Auth.CreateKey(c.r.Context(), NewKey{
		Name: b.Name, Workspace: b.Workspace, Role: b.Role, ControlPlane: b.ControlPlane, ExpiresAt: expires, Actor: c.principal.actor(),
	})
	if err != nil {
		return err
	}
	c.resource = k.ID
	return c.json(CreatedKey{KeyBody: keyBody(k), Secret: secret})
}

// future reads a time that is yet to come; empty is the zero time.
func (c *call) future(field, text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return at, invalid(field, "must be a time as 2027-01-31T00:00:00Z (RFC 3339), not %q", clip(text, 40))
	}
	if !at.After(c.s.now()) {
		return at, invalid(field, "must be in the future")
	}
	return at, nil
}

func listKeys(c *call) error {
	all, err := c.s.o.Auth.Keys(c.workspace)
	if err != nil {
		return err
	}
	list := make([]KeyBody, len(all))
	for i, k := range all {
		list[i] = keyBody(k)
	}
	return c.json(list)
}

func revokeKey(c *call) error {
	c.resource = clip(c.r.PathValue("id"), 64)
	k, err := c.s.o.Auth.RevokeKey(c.r.Context(), c.workspace, c.r.PathValue("id"), c.principal.actor())
	if err != nil {
		return err
	}
	return c.json(keyBody(k))
}

// Token is the answer to a client that trades its key for an access token.
type Token struct {
	AccessToken  string `json:"access_token"`
	RefreshToken string `json:"refresh_token"`
	ExpiresIn    int64  `json:"expires_in"` // seconds
	TokenType    string `json:"token_type"`
}

type tokenRequest struct {
	GrantType    string `json:"grant_type"`
	RefreshToken string `json:"refresh_token"`
	ClientSecret string `json:"client_secret"`
}

// createToken takes client credentials by HTTP Basic or in the body; the secret
// is an API key. There is no refresh token of its own: the credentials are good
// for the next token as well.
func createToken(c *call) error {
	b, err := c.tokenRequest()
	if err != nil {
		return err
	}
	if b.GrantType != "client_credentials" && b.GrantType != "refresh_token" {
		return invalid("grant_type", "must be client_credentials or refresh_token")
	}
	secret := b.ClientSecret
	if _, password, ok := c.r.BasicAuth(); ok {
		secret = password
	}
	if b.GrantType == "refresh_token" && secret == "" {
		secret = b.RefreshToken
	}
	token, life, err := c.s.o.Auth.IssueToken(secret)
	if err != nil {
		return c.denied(err)
	}
	return c.json(Token{AccessToken: token, ExpiresIn: int64(life / time.Second), TokenType: "Bearer"})
}

func (c *call) tokenRequest() (b tokenRequest, err error) {
	m, _, err := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	if err != nil || m != "application/x-www-form-urlencoded" {
		return b, c.decode(&b)
	}
	raw, err := c.readBody()
	if err != nil {
		return b, err
	}
	form, err := url.ParseQuery(string(raw))
	if err != nil {
		return b, invalid("body", "is not a well-formed form")
	}
	return tokenRequest{form.Get("grant_type"), form.Get("refresh_token"), form.Get("client_secret")}, nil
}

// WorkspaceBody is a workspace on the wire.
type WorkspaceBody struct {
	ID          string    `json:"id"`
	Name        string    `json:"name"`
	DisplayName string    `json:"displayName"`
	CreatedAt   string    `json:"createdAt"`
	UpdatedAt   string    `json:"updatedAt"`
	Status      string    `json:"status"`
	Quota       QuotaBody `json:"quota"`
}

// QuotaBody bounds a workspace; 0 is no bound.
type QuotaBody struct {
	Volumes    int64 `json:"volumes"`
	MiB        int64 `json:"mib"`
	LargestMiB int64 `json:"largestMiB"`
	Snapshots  int64 `json:"snapshots"`
}

type quotaRequest struct {
	Volumes    json.RawMessage `json:"volumes"`
	MiB        json.RawMessage `json:"mib"`
	LargestMiB json.RawMessage `json:"largestMiB"`
	Snapshots  json.RawMessage `json:"snapshots"`
}
