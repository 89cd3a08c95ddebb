package auth

import (
	"encoding/hex"
	"fmt"
	"log/slog"
	"time"

	"holdfast/api"
)

// keyRecord is an API key as it is stored.
type keyRecord struct {
	Sequence     uint64    `json:"sequence"` // of changes; the higher one is the truth
	ID           string    `json:"id"`
	Name         string    `json:"name,omitempty"`
	Hash         string    `json:"hash"` // SHA-256 of the text, hex
	Workspace    string    `json:"workspace,omitempty"`
	Role         api.Role  `json:"role"`
	ControlPlane bool      `json:"controlPlane,omitempty"`
	CreatedAt    time.Time `json:"createdAt"`
	CreatedBy    string    `json:"createdBy,omitempty"`
	ExpiresAt    time.Time `json:"expiresAt,omitzero"`
	RevokedAt    time.Time `json:"revokedAt,omitzero"`
	RevokedBy    string    `json:"revokedBy,omitempty"`
}

// LogValue keeps the hash out of logs.
func (k keyRecord) LogValue() slog.Value {
	return slog.GroupValue(slog.String("id", k.ID), slog.String("name", k.Name), slog.String("workspace", k.Workspace),
		slog.String("role", string(k.Role)), slog.Bool("controlPlane", k.ControlPlane))
}

// String is LogValue for fmt.
func (k keyRecord) String() string { return k.LogValue().String() }

// GoString is String: %#v shows no hash either.
func (k keyRecord) GoString() string { return k.String() }

func (k keyRecord) decodeHash() (h [32]byte, err error) {
	n, err := hex.Decode(h[:], []byte(k.Hash))
	if err == nil && n != len(h) {
		err = fmt.Errorf("hash of %d bytes", n)
	}
	return h, err
}

// over tells whether the key is good for nothing any more, and why.
func (k keyRecord) over(now time.Time) (why string) {
	switch {
	case !k.RevokedAt.IsZero():
		return "the key was revoked"
	case !k.ExpiresAt.IsZero() && !now.Before(k.ExpiresAt):
		return "the key has expired"
	}
	return ""
}

func (k keyRecord) principal() api.Principal {
	return api.Principal{KeyID: k.ID, Name: k.Name, Role: k.Role, Workspace: k.Workspace, ControlPlane: k.ControlPlane}
}

func (k keyRecord) key() api.Key {
	return api.Key{
		ID: k.ID, Name: k.Name, Prefix: textPrefix + k.ID, Workspace: k.Workspace, Role: k.Role, ControlPlane: k.ControlPlane,
		CreatedAt: k.CreatedAt, CreatedBy: k.CreatedBy, ExpiresAt: k.ExpiresAt, RevokedAt: k.RevokedAt,
	}
}

// workspaceRecord is a workspace as it is stored. A deleted one stays as a mark,
// so that neither the log nor the database can bring it back.
type workspaceRecord struct {
	Sequence    uint64    `json:"sequence"`
	ID          string    `json:"id"`
	Name        string    `json:"name"`
	DisplayName string    `json:"displayName,omitempty"`
	CreatedAt   time.Time `json:"createdAt"`
	CreatedBy   string    `json:"createdBy,omitempty"`
	UpdatedAt   time.Time `json:"updatedAt"`
	UpdatedBy   string    `json:"updatedBy,omitempty"`
	DeletedAt   time.Time `json:"deletedAt,omitzero"`
}

func (w workspaceRecord) workspace() api.Workspace {
	return api.Workspace{ID: w.ID, Name: w.Name, DisplayName: w.DisplayName, CreatedAt: w.CreatedAt, UpdatedAt: w.UpdatedAt}
}
