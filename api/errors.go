package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
	"holdfast/engine"
	"holdfast/metadata"
	"holdfast/templates"
	"holdfast/templates/archive"
	"holdfast/templates/delta"
	"holdfast/templates/oci"
	"holdfast/templates/remote"
)

// Sentinels of this package.
var (
	// ErrBadRequest: the request breaks a rule that its message names. 400.
	ErrBadRequest = errors.New("bad request")
	// ErrBadCursor: a cursor that this server did not make for this query, or an old one. 400.
	ErrBadCursor = errors.New("cursor is not valid for this query")
	// ErrBadVersion: an unknown Blaxel-Version. 400.
	ErrBadVersion = errors.New("unknown API version")
	// ErrUnauthorized: missing or invalid credentials. 401.
	ErrUnauthorized = errors.New("missing or invalid credentials")
	// ErrForbidden: the credentials do not allow this. 403.
	ErrForbidden = errors.New("not permitted")
	// ErrMissing: no such thing, or not in this workspace. 404.
	ErrMissing = errors.New("not found")
	// ErrMethod: the path exists, the method does not. 405.
	ErrMethod = errors.New("method not allowed")
	// ErrTemplateExists: POST of a template whose name is taken. 409.
	ErrTemplateExists = errors.New("template already exists")
	// ErrBodyTooLarge: the body is over the limit. 413.
	ErrBodyTooLarge = errors.New("request body is too large")
	// ErrTooMany: a rate or concurrency limit. 429.
	ErrTooMany = errors.New("too many requests")
	// ErrDraining: the daemon is stopping and takes no new mutations. 503.
	ErrDraining = errors.New("service is stopping")
)

// answer is how a sentinel shows on the wire.
type answer struct {
	err    error
	status int
	word   string // the body's "error"
	hide   bool   // the error's text is ours alone: the sentinel's own text is shown
}

// answers is the one table from sentinels to HTTP. The first match counts, so
// what is more exact stands before what wraps it.
var answers = []answer{
	{ErrBadRequest, 400, "INVALID_REQUEST", false},
	{ErrBadCursor, 400, "INVALID_CURSOR", false},
	{ErrBadVersion, 400, "invalid_api_version", false},
	{ErrUnauthorized, 401, "UNAUTHORIZED", false},
	{ErrForbidden, 403, "FORBIDDEN", false},
	{ErrMissing, 404, "NOT_FOUND", false},
	{ErrMethod, 405, "METHOD_NOT_ALLOWED", false},
	{ErrTemplateExists, 409, "VOLUME_TEMPLATE_ALREADY_EXISTS", false},
	{ErrSandboxExists, 409, "SANDBOX_ALREADY_EXISTS", false},
	{ErrSandboxCreating, 409, "SANDBOX_ALREADY_EXISTS", false},
	{ErrSandboxDown, 409, "SANDBOX_NOT_RUNNING", false},
	{ErrSandboxFile, 409, "SANDBOX_REFUSED", false},
	{ErrSandboxVolume, 400, "VOLUME_NOT_FOUND", false},
	{ErrBodyTooLarge, 413, "BODY_TOO_LARGE", false},
	{ErrTooMany, 429, "TOO_MANY_REQUESTS", false},
	{ErrDraining, 503, "SERVICE_UNAVAILABLE", false},

	{engine.ErrNotFound, 404, "NOT_FOUND", false},
	{engine.ErrExists, 409, "VOLUME_ALREADY_EXISTS", false},
	{engine.ErrAttached, 409, "VOLUME_ATTACHED", false},
	{engine.ErrConflict, 409, "CONFLICT", false},
	{engine.ErrInvalid, 400, "INVALID_REQUEST", false},
	{engine.ErrQuota, 403, "QUOTA_EXCEEDED", false},
	{engine.ErrNoSpace, 403, "POOL_FULL", false},
	{engine.ErrUnsupported, 409, "UNSUPPORTED", false},
	{engine.ErrHanging, 409, "VOLUME_HANGING", false},
	{engine.ErrCannotFence, 409, "CANNOT_FENCE", false},
	{engine.ErrUnavailable, 503, "SERVICE_UNAVAILABLE", true},

	{blockdev.ErrUnavailable, 503, "POOL_UNAVAILABLE", true},
	{blockdev.ErrUnreachable, 503, "BASE_UNREACHABLE", true},
	{blockdev.ErrLayered, 409, "HYDRATING", false},

	{templates.ErrNotFound, 404, "NOT_FOUND", false},
	{templates.ErrInvalid, 400, "INVALID_REQUEST", false},
	{templates.ErrArchive, 400, "ARCHIVE_REFUSED", false},
	{templates.ErrUploadGone, 400, "UPLOAD_URL_INVALID", false},
	{templates.ErrLastRevision, 400, "LAST_VERSION", false},
	{templates.ErrTooSmall, 400, "INVALID_REQUEST", false},
	{templates.ErrInUse, 409, "VOLUME_TEMPLATE_IN_USE", false},
	{templates.ErrNoSpace, 403, "POOL_FULL", false},
	{templates.ErrBusy, 429, "TOO_MANY_REQUESTS", false},
	{templates.ErrPinned, 409, "VERSION_PINNED", false},
	{templates.ErrChunks, 409, "CHUNKS_MISSING", false},
	{templates.ErrDamaged, 409, "VERSION_DAMAGED", false},
	{templates.ErrRemote, 409, "VERSION_REMOTE", false},
	{remote.ErrInvalidURL, 400, "INVALID_REQUEST", false},
	{remote.ErrNotAllowed, 403, "STORE_NOT_ALLOWED", false},
	{remote.ErrManifest, 400, "MANIFEST_REFUSED", false},
	{remote.ErrStore, 502, "STORE_FAILED", false},
	{remote.ErrStream, 500, "INTERNAL_ERROR", true},
	{remote.ErrOther, 500, "INTERNAL_ERROR", true},
	{delta.ErrMalformed, 400, "INVALID_REQUEST", false},
	{delta.ErrDigest, 400, "INVALID_REQUEST", false},
	{archive.ErrRefused, 400, "ARCHIVE_REFUSED", false},
	{oci.ErrInvalid, 400, "INVALID_REQUEST", false},
	{oci.ErrNotAllowed, 403, "REGISTRY_NOT_ALLOWED", false},
	{oci.ErrNotFound, 400, "IMAGE_NOT_FOUND", false},
	{oci.ErrRegistry, 502, "REGISTRY_FAILED", false},

	{filesystem.ErrNoFile, 404, "NOT_FOUND", false},
	{filesystem.ErrTooSmall, 400, "INVALID_REQUEST", true},
	{filesystem.ErrNeedsMount, 409, "UNSUPPORTED", true},
	{filesystem.ErrCannotGrowMounted, 409, "UNSUPPORTED", true},
	{filesystem.ErrDirty, 409, "VOLUME_NEEDS_RECOVERY", true},
	{filesystem.ErrFrozen, 409, "CONFLICT", true},
	{filesystem.ErrReadOnly, 409, "UNSUPPORTED", true},
	{filesystem.ErrNeedsRepair, 409, "VOLUME_DAMAGED", true},
	{filesystem.ErrForeign, 409, "UNSUPPORTED", true},
	{filesystem.ErrUnfit, 409, "UNSUPPORTED", true},
	{filesystem.ErrLimit, 409, "UNSUPPORTED", true},
	{filesystem.ErrDamaged, 500, "VOLUME_DAMAGED", true},

	{attach.ErrCannotFence, 409, "CANNOT_FENCE", true},
	{attach.ErrNeedsRecovery, 409, "VOLUME_NEEDS_RECOVERY", true},
	{attach.ErrInUse, 409, "VOLUME_BUSY", true},
	{attach.ErrNotInside, 409, "VOLUME_BUSY", true},
	{attach.ErrGuestSilent, 409, "GUEST_SILENT", true},
	{attach.ErrGuestRefused, 409, "GUEST_REFUSED", true},
	{blockdev.ErrBusy, 409, "VOLUME_BUSY", true},
	{blockdev.ErrGone, 409, "SANDBOX_GONE", true},
	{blockdev.ErrInvalid, 400, "INVALID_REQUEST", true},
	{blockdev.ErrNoSpace, 403, "POOL_FULL", true},
	{blockdev.ErrCorrupt, 500, "VOLUME_DAMAGED", true},
	{blockdev.ErrFailed, 503, "STORAGE_FAILED", true},
	{blockdev.ErrNeedsRepair, 503, "STORAGE_FAILED", true},
	{blockdev.ErrNotFound, 500, "IMAGE_MISSING", true},
	{blockdev.ErrExists, 500, "INTERNAL_ERROR", true},

	{metadata.ErrNoSpace, 507, "METADATA_FULL", true},
	{metadata.ErrFailed, 503, "STORAGE_FAILED", true},
	{metadata.ErrClosed, 503, "SERVICE_UNAVAILABLE", true},
	{metadata.ErrDamaged, 503, "STORAGE_FAILED", true},
	{metadata.ErrRolledBack, 503, "STORAGE_FAILED", true},
	{metadata.ErrLocked, 503, "SERVICE_UNAVAILABLE", true},
	{metadata.ErrTooLarge, 500, "INTERNAL_ERROR", true},
	{metadata.ErrNotFound, 500, "INTERNAL_ERROR", true},

	{errors.ErrUnsupported, 409, "UNSUPPORTED", true},
	{context.DeadlineExceeded, 504, "TIMEOUT", true},
	{context.Canceled, 503, "SERVICE_UNAVAILABLE", true},
}

var internalError = answer{nil, 500, "INTERNAL_ERROR", true}

// answerFor finds the table's line for err; a Problem's kind comes before its cause.
func answerFor(err error) answer {
	var p *engine.Problem
	if errors.As(err, &p) {
		for _, a := range answers {
			if errors.Is(p.Kind, a.err) {
				a.hide = false
				return a
			}
		}
	}
	for _, a := range answers {
		if errors.Is(err, a.err) {
			return a
		}
	}
	return internalError
}

// ErrorBody is the one shape of every error. Code is the HTTP status as a
// number and Error a word: clients of all four languages need exactly that.
type ErrorBody struct {
	Code    int    `json:"code"`
	Error   string `json:"error"`
	Message string `json:"message"`
}

// bodyFor makes the body that a caller sees. id finds the log line of what is hidden.
func bodyFor(err error, id string) (ErrorBody, answer) {
	a := answerFor(err)
	b := ErrorBody{Code: a.status, Error: a.word}
	var p *engine.Problem
	switch {
	case errors.As(err, &p):
		b.Message = p.Error()
		if errors.Is(p.Kind, engine.ErrExists) && p.Field != "" && p.Field != "metadata.name" {
			b.Error = "ALREADY_EXISTS"
		}
	case a.err == nil:
		b.Message = "internal error; the log has it under request " + id
	case errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, blockdev.ErrUnreachable): // that says why it took so long
		b.Message = "not finished in time; it may still finish: ask for the state"
	case a.hide:
		b.Message = a.err.Error()
	default:
		b.Message = messageOf(err, a.err)
	}
	return b, a
}

// messageOf leaves out the text of a sentinel of ours where more follows it.
func messageOf(err, kind error) string {
	var f *fault
	if errors.As(err, &f) {
		return f.message
	}
	if slices.Contains([]error{ErrBadRequest, ErrUnauthorized, ErrForbidden, ErrMissing}, kind) {
		return strings.TrimPrefix(err.Error(), kind.Error()+": ")
	}
	return err.Error()
}

// fault is an error of this package: a sentinel with a message for the caller.
type fault struct {
	kind    error
	message string
	after   int // seconds for Retry-After; 0: none
}

func (f *fault) Error() string { return f.kind.Error() + ": " + f.message }
func (f *fault) Unwrap() error { return f.kind }

func refuse(kind error, format string, args ...any) error {
	return &fault{kind: kind, message: fmt.Sprintf(format, args...)}
}

// invalid is a 400 that names the field and the rule.
func invalid(field, format string, args ...any) error {
	return refuse(ErrBadRequest, "%s: %s", field, fmt.Sprintf(format, args...))
}

// writeError answers err. Clients of Go retry 409 and 5xx unless told not to:
// only what can pass by itself is left to them.
func writeError(w http.ResponseWriter, err error, id string) ErrorBody {
	b, a := bodyFor(err, id)
	errorHeaders(w.Header(), err, a)
	writeJSON(w, a.status, b)
	return b
}

func errorHeaders(h http.Header, err error, a answer) {
	switch a.status {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		after := 1
		var f *fault
		if errors.As(err, &f) && f.after > 0 {
			after = f.after
		}
		h.Set("Retry-After", strconv.Itoa(after))
	case http.StatusInternalServerError, http.StatusGatewayTimeout:
	default:
		h.Set("X-Should-Retry", "false")
	}
	if a.status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Bearer realm="holdfast"`)
	}
}

// writeJSON sends v. Marshalling our own wire types cannot fail.
func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("api: encode %T: %v", v, err))
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(b)+1))
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n'))
}
