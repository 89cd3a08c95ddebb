package api

import (
	"net/http"
	"net/url"
	"path"
	"regexp"
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
	byOperator                    // a control-plane principal and one workspace
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

// table finds routes. There are two muxes because some literals stand in the place
// of a name, which one mux refuses as ambiguous: those are asked first.
type table struct {
	muxes    []*http.ServeMux
	patterns map[string]bool
}

// literals are those that stand where another route has a name.
var literals = []string{"/by-external-id/", "/filesystem-multipart/initiate/"}

// newTable registers the routes; run answers a request once its route is known.
func newTable(routes []route, run func(*http.Request, *route)) *table {
	t := &table{muxes: []*http.ServeMux{http.NewServeMux(), http.NewServeMux()}, patterns: map[string]bool{}}
	for i := range routes {
		r := &routes[i]
		mux := t.muxes[1]
		if slices.ContainsFunc(literals, func(l string) bool { return strings.Contains(r.pattern, l) }) {
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
	inSandbox := foldFilePath(r.URL)
	// The mux would redirect a path like /v0//volumes, with a body in HTML.
	if path.Clean(r.URL.Path) != r.URL.Path && !inSandbox {
		return nil, nil, noPath(r)
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
	return nil, nil, noPath(r)
}

func noPath(r *http.Request) error {
	if runPath.MatchString(r.URL.Path) {
		return refuse(ErrMissing, "the sandboxes of this server do not have this: they run processes and read and write files")
	}
	return refuse(ErrMissing, "no such path")
}

var (
	runPath  = regexp.MustCompile(`^/v0/sandboxes/[^/]+/run/`)
	filePath = regexp.MustCompile(`^(/v0/sandboxes/[^/]+/run/(?:filesystem/tree|filesystem-multipart/initiate|filesystem)/)(.*)$`)
)

// foldFilePath makes one segment of the path of a file in a sandbox. Clients send
// it as one (%2Fdata%2Ffile), or as it is behind the slash: //data/file.
func foldFilePath(u *url.URL) bool {
	parts := filePath.FindStringSubmatch(u.EscapedPath())
	if parts == nil {
		return false
	}
	file, err := url.PathUnescape(parts[2])
	if err != nil {
		return false
	}
	prefix, err := url.PathUnescape(parts[1])
	if err != nil {
		return false
	}
	if strings.Trim(file, "/") == "" {
		file = "/." // a segment that is "/" means the end of a path to the mux
	}
	u.Path, u.RawPath = prefix+file, parts[1]+url.PathEscape(file)
	return true
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
