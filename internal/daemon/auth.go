package daemon

import (
	"context"
	"errors"
	"net/http"
	"time"

	"holdfast/api"
)

// auth finds who asks over TCP.
func (n *node) auth() api.Access { return noKeys{} }

// noKeys knows no key: only the local socket is answered.
type noKeys struct{}

var _ api.Access = noKeys{}

func (noKeys) Authenticate(*http.Request) (api.Principal, error) {
	return api.Principal{}, api.ErrUnauthorized
}
func (noKeys) IssueToken(string) (string, time.Duration, error) { return "", 0, api.ErrUnauthorized }
func (noKeys) CreateKey(context.Context, api.NewKey) (api.Key, string, error) {
	return api.Key{}, "", errors.ErrUnsupported
}
func (noKeys) Keys(string) ([]api.Key, error) { return nil, nil }
func (noKeys) RevokeKey(context.Context, string, string, string) (api.Key, error) {
	return api.Key{}, api.ErrMissing
}
func (noKeys) PutWorkspace(context.Context, string, *string, string) (api.Workspace, error) {
	return api.Workspace{}, errors.ErrUnsupported
}
func (noKeys) Workspace(string) (api.Workspace, error) { return api.Workspace{}, api.ErrMissing }
func (noKeys) Workspaces() ([]api.Workspace, error)    { return nil, nil }
