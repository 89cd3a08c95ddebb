package api

import (
	"net/http"
	"path"
	"slices"
	"strings"
)

// scope says what a request must come with.
type scope int

const (
	open             scope = iota // nothing: health, OpenAPI, signed uploads, tokens
	inWorkspace                   // a principal and one workspace
	mayNameWorkspace              // a principal; a control-plane one may leave the workspace out
	onNode                        // a control-plane principal
)

// route is one line of the API.
type route struct {
	pattern  string // of http.ServeMux: "GET /v0/volumes/{name}"
	scope    scope
	role     Role   // at least
	action   string // of a mutation, for the audit log: "volume.create"; empty: it changes nothing
	transfer bool   // long bodies: idle deadlines instead of one for the whole
	serve    func(*call) error
}

// name is the route's label in metrics and logs: the pattern without its method.
func (r *route) name() string {
	_, p, _ := strings.Cut(r.pattern, " ")
	return p
}

// table finds routes. There are two muxes because by-external-id is a literal in
// the place of a volume's name, which one mux refuses as ambiguous.
type table struct {
	muxes    []*http.ServeMux
	patterns map[string]bool
}

const byExternalID = "/v0/volumes/by-external-id/"

// newTable registers the routes; run answers a request once its route is known.
func newTable(routes []route, run func(*http.Request, *route)) *table {
	t := &table{muxes: []*http.ServeMux{http.NewServeMux(), http.NewServeMux()}, patterns: map[string]bool{}}
	for i := range routes {
		r := &routes[i]
		mux := t.muxes[1]
		if strings.Contains(r.pattern, byExternalID) {
			mux = t.muxes[0]
		}
		mux.HandleFunc(r.pattern, func(_ http.ResponseWriter, req *http.Request) { run(req, r) })
		t.patterns[r.pattern] = true
	}
	return t
}

// find gives the mux that has a route for the request. Unknown paths are
// ErrMissing, known ones with another method ErrMethod with the methods that are.
func (t *table) find(r *http.Request) (mux *http.ServeMux, allowed []string, err error) {
	// The mux would redirect a path like /v0//volumes, with a body in HTML.
	if path.Clean(r.URL.Path) != r.URL.Path {
		return nil, nil, refuse(ErrMissing, "no such path")
	}
	if mux := t.match(r); mux != nil {
		return mux, nil, nil
	}
	probe := r.Clone(r.Context())
	for _, m := range methods {
		if probe.Method = m; t.match(probe) != nil {
			allowed = append(allowed, m)
		}
	}
	if len(allowed) > 0 {
		return nil, allowed, refuse(ErrMethod, "this path takes %s", strings.Join(allowed, ", "))
	}
	return nil, nil, refuse(ErrMissing, "no such path")
}

func (t *table) match(r *http.Request) *http.ServeMux {
	for _, mux := range t.muxes {
		if _, pattern := mux.Handler(r); t.patterns[pattern] {
			return mux
		}
	}
	return nil
}

// methods are those that some route takes.
var methods = []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete}

// methodLabel bounds a metric's label.
func methodLabel(m string) string {
	if slices.Contains(methods, m) {
		return m
	}
	return "other"
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}
