package api

import (
	"encoding/json"
	"errors"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"holdfast/engine"
)

// The rules of a listing's parameters, as the contract has them.
const (
	defaultLimit = 50
	maxLimit     = 200
	maxSearch    = 200 // characters
	minSearch    = 2   // shorter ones do not filter
	maxLabels    = 16
)

// statuses are all that the contract knows; CREATED is not in its enum but was seen.
var statuses = []engine.Status{
	"DELETING", "TERMINATED", "FAILED", "DEACTIVATED", "DEACTIVATING", "UPLOADING", "BUILDING", "DEPLOYING", "DEPLOYED", "BUILT",
}

const statusCreated engine.Status = "CREATED"

func listVolumes(c *call) error {
	q, err := c.listQuery()
	if err != nil {
		return err
	}
	binding := listBinding(c.workspace, q)
	if c.version >= version2 {
		if text := c.r.URL.Query().Get("cursor"); text != "" {
			if q.Tail {
				return invalid("anchor", "is for the first page, not beside a cursor")
			}
			if q.After, err = c.s.openCursor(text, binding); err != nil {
				return err
			}
		}
	}
	page, err := c.s.o.Engine.List(c.workspace, q)
	if err != nil {
		return err
	}
	if c.version < version2 {
		all := make([]Volume, len(page.Volumes))
		for i, v := range page.Volumes {
			all[i] = volumeBody(v, nil)
		}
		return c.json(all)
	}
	list := VolumeList{Data: make([]LiteVolume, len(page.Volumes)), Meta: PageMeta{Total: page.Total}}
	for i, v := range page.Volumes {
		list.Data[i] = liteBody(v)
	}
	if page.Next != nil {
		list.Meta.HasMore, list.Meta.NextCursor = true, c.s.sealCursor(*page.Next, binding)
	}
	return c.json(list)
}

// listBinding is what a cursor belongs to: workspace, order and filters; not the limit.
func listBinding(workspace string, q engine.Query) []byte {
	b, err := json.Marshal(struct {
		Workspace, Sort, Search, ExternalID string
		Statuses                            []engine.Status
		Labels                              map[string]string
	}{workspace, string(q.Sort), q.Search, q.ExternalID, q.Statuses, q.Labels})
	if err != nil {
		panic("api: " + err.Error())
	}
	return b
}

// listQuery reads the parameters. Before 2026-04-28 all volumes are listed: no
// page, order or search, and the statuses are checked without being a filter.
func (c *call) listQuery() (q engine.Query, err error) {
	v, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return q, invalid("query", "is not well-formed")
	}
	q.ExternalID = v.Get("externalId")
	var errs [6]error
	q.Statuses, errs[0] = listStatuses(v["status"])
	q.Labels, errs[1] = listLabels(v["label"])
	if c.version < version2 {
		q.Statuses = nil
		return q, firstOf(errs[:])
	}
	q.Limit, errs[2] = listLimit(v)
	q.Sort, errs[3] = listSort(v.Get("sort"))
	q.Search, errs[4] = listSearch(v.Get("q"))
	q.Tail, errs[5] = listAnchor(v.Get("anchor"), q.Sort)
	return q, firstOf(errs[:])
}

func firstOf(errs []error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// listLimit clamps what is too large and refuses what is not a count.
func listLimit(v url.Values) (int, error) {
	text := v.Get("limit")
	if text == "" {
		return defaultLimit, nil
	}
	n, err := strconv.Atoi(text)
	if errors.Is(err, strconv.ErrRange) && text[0] != '-' {
		return maxLimit, nil
	}
	if err != nil || n < 1 {
		return 0, invalid("limit", "must be a whole number of at least 1 (more than %d is %d), not %q", maxLimit, maxLimit, clip(text, 32))
	}
	return min(n, maxLimit), nil
}

func listSort(text string) (engine.Sort, error) {
	switch s := engine.Sort(text); s {
	case "":
		return engine.NewestFirst, nil
	case engine.NewestFirst, engine.OldestFirst, engine.NameUp, engine.NameDown:
		return s, nil
	}
	return "", invalid("sort", "must be one of %s, %s, %s, %s", engine.NewestFirst, engine.OldestFirst, engine.NameUp, engine.NameDown)
}

func listSearch(text string) (string, error) {
	text = strings.ToLower(strings.TrimSpace(text))
	switch n := utf8.RuneCountInString(text); {
	case n > maxSearch:
		return "", invalid("q", "must have at most %d characters, not %d", maxSearch, n)
	case n < minSearch:
		return "", nil
	}
	return text, nil
}

func listAnchor(text string, sort engine.Sort) (tail bool, err error) {
	switch {
	case text == "":
		return false, nil
	case text != "end":
		return false, invalid("anchor", `must be "end"`)
	case sort != engine.NewestFirst && sort != engine.OldestFirst:
		return false, invalid("anchor", "is only for the sorts %s and %s", engine.NewestFirst, engine.OldestFirst)
	}
	return true, nil
}

// listStatuses gives the statuses to show, sorted; nil for all.
func listStatuses(lists []string) ([]engine.Status, error) {
	var found []engine.Status
	for _, text := range strings.Split(strings.Join(lists, ","), ",") {
		s := engine.Status(strings.ToUpper(strings.TrimSpace(text)))
		if s == "" {
			continue
		}
		if s != statusCreated && !slices.Contains(statuses, s) {
			return nil, invalid("status", "%q is not a status; they are %s", clip(text, 32), join(statuses))
		}
		found = append(found, s)
	}
	slices.Sort(found)
	found = slices.Compact(found)
	for _, s := range statuses {
		if !slices.Contains(found, s) {
			return found, nil
		}
	}
	return nil, nil
}

func join(all []engine.Status) string {
	text := make([]string, len(all))
	for i, s := range all {
		text[i] = string(s)
	}
	return strings.Join(text, ", ")
}

// listLabels reads label=key=value, which may come several times: all must match.
func listLabels(pairs []string) (map[string]string, error) {
	if len(pairs) > maxLabels {
		return nil, invalid("label", "may be given at most %d times", maxLabels)
	}
	var labels map[string]string
	for _, pair := range pairs {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return nil, invalid("label", "must be key=value, not %q", clip(pair, 64))
		}
		if old, twice := labels[key]; twice && old != value {
			return nil, invalid("label", "%q is asked to have two values", clip(key, 64))
		}
		if labels == nil {
			labels = map[string]string{}
		}
		labels[key] = value
	}
	return labels, nil
}
