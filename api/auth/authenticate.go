package auth

import (
	"crypto/subtle"
	"fmt"
	"net/http"
	"strings"
	"time"

	"holdfast/api"
)

// The headers that carry credentials. When both are there the first decides
// alone: the other may be a proxy's.
var credentialHeaders = []string{"X-Blaxel-Authorization", "Authorization"}

// Authenticate finds the principal of a request by "Bearer" and an API key or
// an access token. Every error wraps api.ErrUnauthorized and says nothing that
// the caller does not know.
func (a *Auth) Authenticate(r *http.Request) (api.Principal, error) {
	for _, name := range credentialHeaders {
		switch values := r.Header.Values(name); len(values) {
		case 0:
			continue
		case 1:
			return a.Identify(bearer(values[0]))
		default:
			return api.Principal{}, unauthorized("%s is there more than once", name)
		}
	}
	return api.Principal{}, unauthorized("send \"Authorization: Bearer KEY\"")
}

// bearer gives what follows the scheme; empty: it is another scheme.
func bearer(value string) string {
	scheme, credentials, _ := strings.Cut(strings.TrimSpace(value), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(credentials)
}

// Identify finds the principal of an API key or access token.
func (a *Auth) Identify(credentials string) (api.Principal, error) {
	k, err := a.holder(credentials)
	if err != nil {
		return api.Principal{}, err
	}
	now := a.now()
	if why := k.over(now); why != "" {
		return api.Principal{}, unauthorized("%s", why)
	}
	k.used.Store(now.Unix())
	return k.principal(), nil
}

// holder finds the key whose text or token was given, revoked and expired ones too.
func (a *Auth) holder(credentials string) (*heldKey, error) {
	if id, ok := parseText(credentials); ok {
		return a.byText(id, credentials)
	}
	if strings.HasPrefix(credentials, textPrefix) {
		return nil, unauthorized("the key is not complete or has a typing error")
	}
	if id, err := a.signer.verify(credentials, a.now()); err == nil {
		if k := a.held(id); k != nil {
			return k, nil
		}
	}
	return nil, unauthorized("the key or token is not valid")
}

func (a *Auth) byText(id, text string) (*heldKey, error) {
	k := a.held(id)
	got := hashText(text)
	if k == nil || subtle.ConstantTimeCompare(got[:], k.hash[:]) != 1 {
		return nil, unauthorized("the key or token is not valid")
	}
	return k, nil
}

func (a *Auth) held(id string) *heldKey {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.keys[id]
}

// IssueToken trades an API key for an access token, which is good for Options.Life
// and no longer than the key.
func (a *Auth) IssueToken(text string) (token string, life time.Duration, err error) {
	id, ok := parseText(text)
	if !ok {
		return "", 0, unauthorized("the client secret is not an API key")
	}
	p, err := a.Identify(text)
	if err != nil {
		return "", 0, err
	}
	now := a.now()
	life = a.o.Life
	if k := a.held(id); k != nil && !k.ExpiresAt.IsZero() {
		life = min(life, k.ExpiresAt.Sub(now))
	}
	return a.signer.token(p.KeyID, now, life), life, nil
}

func unauthorized(format string, args ...any) error {
	return fmt.Errorf("%w: %s", api.ErrUnauthorized, fmt.Sprintf(format, args...))
}
