package api

import (
	_ "embed"
	"encoding/json"
	"net/http"
)

// Pool is a pool's space and promises, in bytes.
type Pool struct {
	Name          string       `json:"name"`
	Backend       string       `json:"backend"`
	Unavailable   string       `json:"unavailable,omitempty"` // why it is not open
	Total         int64        `json:"total"`
	Free          int64        `json:"free"`
	Allocated     int64        `json:"allocated"`
	Trash         int64        `json:"trash"`
	Provisioned   int64        `json:"provisioned"`
	Other         int64        `json:"other"`
	Reserve       int64        `json:"reserve"`
	Available     int64        `json:"available"`
	Shared        int64        `json:"shared"`
	Overprovision float64      `json:"overprovision"`
	Volumes       int          `json:"volumes"`
	Snapshots     int          `json:"snapshots"`
	Quarantined   []Quarantine `json:"quarantined"`
}

// Quarantine is something found in a pool that nothing explains.
type Quarantine struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
	Bytes  int64  `json:"bytes"`
}

func listPools(c *call) error {
	all, err := c.s.o.Engine.Pools(c.r.Context())
	if err != nil {
		return err
	}
	list := make([]Pool, len(all))
	for i, p := range all {
		list[i] = Pool{
			Name: p.Name, Backend: p.Backend, Unavailable: p.Unavailable, Total: p.Capacity.Total, Free: p.Capacity.Free, Allocated: p.Capacity.Allocated, Trash: p.Capacity.Trash,
			Provisioned: p.Provisioned, Other: p.Other, Reserve: p.Reserve, Available: p.Available, Shared: p.Shared,
			Overprovision: p.Ratio, Volumes: p.Volumes, Snapshots: p.Snapshots, Quarantined: make([]Quarantine, len(p.Quarantined)),
		}
		for j, q := range p.Quarantined {
			list[i].Quarantined[j] = Quarantine{Name: q.Name, Reason: q.Reason, Bytes: q.Bytes}
		}
	}
	return c.json(list)
}

// Check is one thing that the node looked at.
type Check struct {
	Name        string `json:"name"`
	Status      string `json:"status"` // ok, warn, fail
	Found       string `json:"found"`
	Consequence string `json:"consequence,omitempty"`
	Fix         string `json:"fix,omitempty"`
}

func listChecks(c *call) error {
	checks := []Check{}
	if c.s.o.Doctor != nil {
		checks = append(checks, c.s.o.Doctor(c.r.Context())...)
	}
	return c.json(checks)
}

// AuditEntry is a line of the audit log on the wire.
type AuditEntry struct {
	Time      string `json:"time"`
	Request   string `json:"request"`
	Workspace string `json:"workspace,omitempty"`
	KeyID     string `json:"keyId,omitempty"`
	Principal string `json:"principal,omitempty"`
	Action    string `json:"action"`
	Resource  string `json:"resource,omitempty"`
	Remote    string `json:"remote,omitempty"`
	Status    int    `json:"status"`
	Error     string `json:"error,omitempty"`
}

const (
	defaultAudit = 100
	maxAudit     = 1000
)

func listAudit(c *call) error {
	limit, err := boundedCount("limit", c.r.URL.Query().Get("limit"), defaultAudit, maxAudit)
	if err != nil {
		return err
	}
	list := []AuditEntry{}
	if c.s.o.Audit != nil {
		recent, err := c.s.o.Audit.Recent(c.r.Context(), c.workspace, limit)
		if err != nil {
			return err
		}
		for _, e := range recent {
			list = append(list, AuditEntry{
				Time: stamp(e.Time), Request: e.Request, Workspace: e.Workspace, KeyID: e.KeyID, Principal: e.Principal,
				Action: e.Action, Resource: e.Resource, Remote: e.Remote, Status: e.Status, Error: e.Error,
			})
		}
	}
	return c.json(list)
}

//go:embed openapi.json
var openAPI []byte

// OpenAPI is the document that describes every route, as JSON.
func OpenAPI() []byte { return append([]byte(nil), openAPI...) }

// serveOpenAPI gives the document with the daemon's version in it.
func serveOpenAPI(c *call) error {
	if c.s.o.Version == "" {
		return c.json(json.RawMessage(openAPI))
	}
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(openAPI, &doc); err != nil {
		return err
	}
	var info map[string]any
	if err := json.Unmarshal(doc["info"], &info); err != nil {
		return err
	}
	info["version"] = c.s.o.Version
	b, err := json.Marshal(info)
	if err != nil {
		return err
	}
	doc["info"] = b
	writeJSON(c.w, http.StatusOK, doc)
	return nil
}
