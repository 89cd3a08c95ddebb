package api_test

import (
	"encoding/base64"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/api"
)

func names(l api.VolumeList) (all []string) {
	for _, v := range l.Data {
		all = append(all, v.Metadata.Name)
	}
	return all
}

// walk follows the cursors from a first page, as the TypeScript client does: by
// nextCursor alone, and a repeated one is an error.
func (w *world) walk(query string) (all []string) {
	w.t.Helper()
	seen := map[string]bool{}
	cursor := ""
	for {
		l := into[api.VolumeList](w.request("GET /v0/volumes?"+query+"&cursor="+url.QueryEscape(cursor), nil).is(200))
		all = append(all, names(l)...)
		if l.Meta.HasMore != (l.Meta.NextCursor != "") {
			w.t.Fatalf("hasMore and nextCursor disagree: %+v", l.Meta)
		}
		if cursor = l.Meta.NextCursor; cursor == "" {
			return all
		}
		if seen[cursor] {
			w.t.Fatal("Pagination returned a repeated cursor")
		}
		seen[cursor] = true
	}
}

func TestListPages(t *testing.T) {
	w := newWorld(t)
	var made []string
	for i := range 7 {
		made = append(made, fmt.Sprintf("vol-%d", (i*3)%7))
		w.create(made[i])
	}
	newest := slices.Clone(made)
	slices.Reverse(newest)
	byName := slices.Sorted(slices.Values(made))
	down := slices.Clone(byName)
	slices.Reverse(down)
	for sort, want := range map[string][]string{
		"": newest, "createdAt:desc": newest, "createdAt:asc": made, "name:asc": byName, "name:desc": down,
	} {
		for _, limit := range []string{"1", "2", "3", "7", "200", "201"} {
			if got := w.walk("sort=" + url.QueryEscape(sort) + "&limit=" + limit); !slices.Equal(got, want) {
				t.Errorf("sort %q, limit %s: %v, want %v", sort, limit, got, want)
			}
		}
	}
	tail := into[api.VolumeList](w.request("GET /v0/volumes?anchor=end&limit=3", nil).is(200))
	if got := names(tail); !slices.Equal(got, newest[4:]) || tail.Meta.HasMore {
		t.Errorf("last page: %v, %+v", got, tail.Meta)
	}
	if l := into[api.VolumeList](w.request("GET /v0/volumes?q=vol-3&limit=1", nil).is(200)); l.Meta.Total != 7 || len(l.Data) != 1 {
		t.Errorf("total ignores filters: %+v", l.Meta)
	}
	if l := into[api.VolumeList](w.request("GET /v0/volumes?q=nothing", nil).is(200)); l.Data == nil || l.Meta.HasMore {
		t.Errorf("an empty page: %+v", l)
	}
}

func TestListDefaultAndLargestPage(t *testing.T) {
	w := newWorld(t)
	for i := range 205 {
		w.create(fmt.Sprintf("v%03d", i))
	}
	for query, want := range map[string]int{"": 50, "limit=200": 200, "limit=205": 200} {
		if l := into[api.VolumeList](w.request("GET /v0/volumes?"+query, nil).is(200)); len(l.Data) != want || !l.Meta.HasMore || l.Meta.Total != 205 {
			t.Errorf("%q: %d items, want %d; %+v", query, len(l.Data), want, l.Meta)
		}
	}
	// Two requests that the document forbids, and are no reason to fail.
	h, auth := w.server.Handler(), "Authorization: Bearer "+adminKey
	if got := len(into[[]api.Volume](send(t, h, "GET /v0/volumes?limit=3&sort=nonsense", nil, auth).is(200))); got != 205 {
		t.Errorf("before 2026-04-28: %d of 205", got)
	}
	huge := send(t, h, "GET /v0/volumes?limit=99999999999999999999", nil, auth, "Blaxel-Version: 2026-04-28").is(200)
	if got := len(into[api.VolumeList](huge).Data); got != 200 {
		t.Errorf("a huge limit is clamped: %d", got)
	}
}

func TestListFilters(t *testing.T) {
	w := newWorld(t)
	for _, v := range []object{
		{"name": "alpha", "displayName": "Größe eins", "labels": object{"env": "integration-test", "tier": "gold=1"}, "externalId": "e-1"},
		{"name": "beta", "labels": object{"env": "production"}, "externalId": "e-2"},
		{"name": "gamma", "displayName": "the third"},
	} {
		w.request("POST /v0/volumes", object{"metadata": v, "spec": object{"size": 1}}).is(200)
	}
	for query, want := range map[string]string{
		"q=alp":                        "alpha",
		"q=GRÖSSE":                     "",
		"q=grö":                        "alpha",
		"q=+integration-test+":         "alpha",
		"q=TIER":                       "alpha",
		"q=third":                      "gamma",
		"q=a":                          "gamma beta alpha", // too short to filter
		"q=":                           "gamma beta alpha",
		"externalId=e-2":               "beta",
		"externalId=none":              "",
		"status=deployed,,failed":      "gamma beta alpha",
		"status=Failed":                "",
		"status=CREATED":               "",
		"label=env%3Dproduction":       "beta",
		"label=env=integration-test":   "alpha",
		"label=tier%3Dgold%3D1":        "alpha",
		"label=env%3Dx&label=tier%3Dy": "",
		"label=env=integration-test&label=tier=gold%3D1":                                                         "alpha",
		"status=DELETING,TERMINATED,FAILED,DEACTIVATED,DEACTIVATING,UPLOADING,BUILDING,DEPLOYING,BUILT":          "",
		"status=DELETING,TERMINATED,FAILED,DEACTIVATED,DEACTIVATING,UPLOADING,BUILDING,DEPLOYING,DEPLOYED,BUILT": "gamma beta alpha",
	} {
		l := into[api.VolumeList](w.request("GET /v0/volumes?"+query, nil).is(200))
		if got := strings.Join(names(l), " "); got != want {
			t.Errorf("%s: %q, want %q", query, got, want)
		}
		if l.Meta.Total != 3 {
			t.Errorf("%s: total %d", query, l.Meta.Total)
		}
	}
	if l := into[api.VolumeList](w.request("GET /v0/volumes?q=alpha", nil).is(200)); l.Data[0].Metadata.Labels["env"] != "integration-test" || l.Data[0].Metadata.Workspace != "main" {
		t.Errorf("labels and workspace are in the listing: %+v", l.Data[0])
	}
	old := "Blaxel-Version: 2026-04-16"
	if l := into[[]api.Volume](w.request("GET /v0/volumes?status=FAILED&q=alpha", nil, old).is(200)); len(l) != 3 {
		t.Errorf("before 2026-04-28 neither status nor q filter: %d", len(l))
	}
	w.request("GET /v0/volumes?status=NONSENSE", nil, old).refused(400, "INVALID_REQUEST", "status")
	if l := into[[]api.Volume](w.request("GET /v0/volumes?externalId=e-1", nil, old).is(200)); len(l) != 1 {
		t.Errorf("externalId filters at every version: %d", len(l))
	}
}

func TestListBadParameters(t *testing.T) {
	w := newWorld(t)
	for query, names := range map[string]string{
		"limit=0": "limit", "limit=-1": "limit", "limit=-99999999999999999999": "limit", "limit=ten": "limit", "limit=1.5": "limit", "limit=+1e1": "limit",
		"sort=size:asc": "sort", "sort=name": "sort", "anchor=start": "anchor", "anchor=end&sort=name:asc": "anchor",
		"q=" + strings.Repeat("x", 201): "q", "status=NONSENSE": "status", "label=novalue": "label", "label==x": "label",
		"label=a=1&label=a=2": "label", "label=a=1" + strings.Repeat("&label=a=1", 16): "label", "q=%zz": "query",
	} {
		w.request("GET /v0/volumes?"+query, nil).refused(400, "INVALID_REQUEST", names+":")
	}
	w.request("GET /v0/volumes?q="+strings.Repeat("x", 200), nil).is(200)
}

func TestCursorsAreBoundAndExpire(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"one", "two", "three"} {
		w.create(name)
	}
	first := into[api.VolumeList](w.request("GET /v0/volumes?limit=1&q=o", nil).is(200))
	good := first.Meta.NextCursor
	use := func(query string, headers ...string) reply {
		t.Helper()
		return w.request("GET /v0/volumes?cursor="+query, nil, headers...)
	}
	use(good).is(200)
	use(good + "&limit=2").is(200) // the limit is not part of it
	for name, query := range map[string]string{
		"another order":   good + "&sort=name:asc",
		"another search":  good + "&q=tw",
		"another status":  good + "&status=FAILED",
		"another label":   good + "&label=a=b",
		"an external id":  good + "&externalId=x",
		"nonsense":        "nonsense",
		"not base64":      "*",
		"empty MAC":       base64.RawURLEncoding.EncodeToString(make([]byte, 32)),
		"zero MAC":        base64.RawURLEncoding.EncodeToString(append(make([]byte, 32), `{"n":"two"}`...)),
		"last bit":        flipLast(t, good),
		"cut":             good[:len(good)-4],
		"longer":          good + "AAAA",
		"with whitespace": good + "%0A",
	} {
		if use(query).refused(400, "INVALID_CURSOR", "cursor"); t.Failed() {
			t.Fatal(name)
		}
	}
	use(good, "Authorization: Bearer "+foreignKey).refused(400, "INVALID_CURSOR", "cursor")
	use(good+"&anchor=end").refused(400, "INVALID_REQUEST", "anchor")
	other := newWorld(t, func(o *api.Options) { o.Secret = []byte(strings.Repeat("z", 32)) })
	other.request("GET /v0/volumes?cursor="+good, nil).refused(400, "INVALID_CURSOR", "cursor")
	w.pass(23*time.Hour + 59*time.Minute)
	use(good).is(200)
	w.pass(2 * time.Minute)
	use(good).refused(400, "INVALID_CURSOR", "24 hours")
}

func flipLast(t *testing.T, cursor string) string {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	return base64.RawURLEncoding.EncodeToString(b)
}

// TestPagesWhileVolumesComeAndGo: what was there all the time is seen exactly once.
func TestPagesWhileVolumesComeAndGo(t *testing.T) {
	w := newWorld(t)
	for i := range 6 {
		w.create(fmt.Sprintf("old-%d", i))
	}
	seen := map[string]int{}
	cursor := ""
	for page := 0; ; page++ {
		l := into[api.VolumeList](w.request("GET /v0/volumes?limit=2&cursor="+cursor, nil).is(200))
		for _, n := range names(l) {
			seen[n]++
		}
		w.create(fmt.Sprintf("new-%d", page))
		if page == 0 {
			w.request("DELETE /v0/volumes/"+l.Data[1].Metadata.Name, nil).is(200) // the cursor's own place
		}
		if cursor = l.Meta.NextCursor; cursor == "" {
			break
		}
	}
	for i := range 6 {
		if n := seen[fmt.Sprintf("old-%d", i)]; n != 1 {
			t.Errorf("old-%d was seen %d times: %v", i, n, seen)
		}
	}
}
