package main

import (
	"context"
	"crypto/tls"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"strings"

	"holdfast/api/client"
	"holdfast/internal/tarball"
)

const (
	exitOK = iota
	exitFailure
	exitUsage
	exitNotFound
	exitConflict
	exitUnauthorized
	exitInvalid
	exitFull
	exitUnreachable
)

// errDoctor ends `doctor` when a check failed; the checks were printed.
var errDoctor = errors.New("this host cannot do the main job; see the checks marked fail")

// explain turns an error into an exit code, a message and what to try.
func (a *app) explain(err error) (code int, text, hint string) {
	var refused *client.Error
	var network *net.OpError
	var ended exitError // of a command in a sandbox
	var stranger *tls.CertificateVerificationError
	switch {
	case !a.parsed:
		return exitUsage, err.Error(), a.usage
	case errors.As(err, &ended):
		return ended.code, err.Error(), ""
	case errors.As(err, &refused):
		code, hint = explainRefusal(refused)
		text = refused.Error()
		if refused.RequestID != "" && refused.Status >= http.StatusInternalServerError {
			text += " (request " + refused.RequestID + ")"
		}
		return code, text, hint
	case errors.Is(err, errUsage):
		return exitUsage, err.Error(), ""
	case errors.Is(err, context.Canceled):
		return exitFailure, "interrupted", ""
	case errors.As(err, &network):
		return exitUnreachable, "cannot reach " + a.server.where() + ": " + network.Err.Error(), a.server.unreachableHint(err)
	case errors.Is(err, http.ErrSchemeMismatch):
		return exitUnreachable, "cannot reach " + a.server.where() + ": it does not speak TLS", "give the URL in --server or HOLDFAST_URL with http://, or the server a certificate"
	case errors.As(err, &stranger):
		return exitUnreachable, "cannot reach " + a.server.where() + ": " + stranger.Error(), "SSL_CERT_FILE can name a file with the authority of the server's certificate"
	case errors.Is(err, tarball.ErrChanged):
		return exitFailure, err.Error(), "push a directory that nothing writes to; no version was made"
	case errors.Is(err, fs.ErrNotExist):
		return exitFailure, err.Error(), ""
	}
	return exitFailure, err.Error(), ""
}

func explainRefusal(e *client.Error) (code int, hint string) {
	switch {
	case e.Code == "QUOTA_EXCEEDED":
		return exitFull, "holdfast workspace quota shows the bounds"
	case e.Status == http.StatusInsufficientStorage:
		return exitFull, "deletes still work; the operator sees the space of the records with holdfast doctor"
	case e.Code == "POOL_FULL":
		return exitFull, "holdfast pool list shows the space; delete volumes or template versions"
	case e.Status == http.StatusUnauthorized:
		return exitUnauthorized, "give a key with --key or HOLDFAST_KEY, or use the daemon's socket as root"
	case e.Code == "STORE_NOT_ALLOWED":
		return exitUnauthorized, "the operator lists prefixes of URLs with the setting remote_templates"
	case e.Code == "REGISTRY_NOT_ALLOWED":
		return exitUnauthorized, "the operator lists registries with the setting registries"
	case e.Status == http.StatusForbidden:
		return exitUnauthorized, "the key's role or workspace does not allow this"
	case e.Status == http.StatusNotFound && strings.HasPrefix(e.Message, "no workspace"):
		return exitNotFound, "make it with holdfast workspace create, or name another with --workspace"
	case e.Status == http.StatusNotFound:
		return exitNotFound, ""
	case e.Status == http.StatusConflict && e.Code == "VOLUME_ATTACHED":
		return exitConflict, "holdfast attachment list VOLUME shows who holds it"
	case e.Status == http.StatusConflict:
		return exitConflict, ""
	case e.Status == http.StatusTooManyRequests, e.Status == http.StatusServiceUnavailable:
		return exitUnreachable, "try again in a moment"
	case e.Status >= 400 && e.Status < 500:
		return exitInvalid, ""
	}
	return exitFailure, ""
}

// errUsage marks mistakes that only show once a command runs.
var errUsage = errors.New("usage")

type usageError struct{ text string }

func (e usageError) Error() string { return e.text }
func (e usageError) Unwrap() error { return errUsage }
