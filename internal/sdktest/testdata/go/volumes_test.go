package gosdk

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	blaxel "github.com/blaxel-ai/sdk-go"
	"github.com/blaxel-ai/sdk-go/option"
)

const region = "us-pdx-1"

// sent counts requests, the SDK's own repetitions among them.
var sent atomic.Int64

// sdk is the client as its defaults make it: all settings are environment.
func sdk(t *testing.T) blaxel.Client {
	t.Helper()
	c, err := blaxel.NewDefaultClient(option.WithMiddleware(func(r *http.Request, next option.MiddlewareNext) (*http.Response, error) {
		sent.Add(1)
		return next(r)
	}))
	must(t, err)
	return c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func unique(prefix string) string {
	b := make([]byte, 4)
	_, _ = rand.Read(b)
	return prefix + "-" + hex.EncodeToString(b)
}

// is checks the type that callers match and the status in it.
func is(t *testing.T, err error, status int) {
	t.Helper()
	var e *blaxel.Error
	if !errors.As(err, &e) || e.StatusCode != status {
		t.Errorf("%T %v, want a *blaxel.Error with %d", err, err, status)
	}
}

func asking(name string, size int64) blaxel.VolumeNewParams {
	return blaxel.VolumeNewParams{Volume: blaxel.VolumeParam{
		Metadata: blaxel.MetadataParam{Name: name, Labels: map[string]string{"env": "test", "language": "go"}},
		Spec:     blaxel.VolumeSpecParam{Size: blaxel.Int(size), Region: blaxel.String(region)},
	}}
}

func create(t *testing.T, c blaxel.Client, p blaxel.VolumeNewParams) *blaxel.VolumeInstance {
	t.Helper()
	v, err := c.Volumes.NewInstance(t.Context(), p)
	must(t, err)
	t.Cleanup(func() {
		var e *blaxel.Error
		err := c.Volumes.DeleteInstance(context.Background(), v.Name())
		if err != nil && (!errors.As(err, &e) || e.StatusCode != http.StatusNotFound) {
			t.Errorf("clean up %s: %v", v.Name(), err)
		}
	})
	return v
}

func TestCreateAndGet(t *testing.T) {
	c := sdk(t)
	name := unique("go")
	made := create(t, c, asking(name, 16))
	got, err := c.Volumes.GetInstance(t.Context(), name)
	must(t, err)
	for _, v := range []*blaxel.VolumeInstance{made, got} {
		if v.Name() != name || v.DisplayName() != name || v.Size() != 16 || v.Region() != region || v.Status != "DEPLOYED" || v.Metadata.Labels["language"] != "go" {
			t.Errorf("%+v", v.Volume)
		}
	}
	if created, err := time.Parse(time.RFC3339Nano, got.Metadata.CreatedAt); err != nil || time.Since(created) > time.Hour {
		t.Errorf("created %q: %v", got.Metadata.CreatedAt, err)
	}
	unnamed := create(t, c, asking("", 16))
	if !strings.HasPrefix(unnamed.Name(), "volume-") {
		t.Errorf("without a name: %q", unnamed.Name())
	}
}

func TestDuplicates(t *testing.T) {
	c := sdk(t)
	name := unique("go")
	first := create(t, c, asking(name, 16))
	before := sent.Load()
	_, err := c.Volumes.New(t.Context(), asking(name, 64))
	is(t, err, http.StatusConflict)
	if n := sent.Load() - before; n != 1 {
		t.Errorf("the duplicate was sent %d times: the SDK repeats a 409 unless it is told not to", n)
	}
	again, err := c.Volumes.CreateInstanceIfNotExists(t.Context(), asking(name, 64))
	must(t, err)
	if again.Size() != 16 || again.Metadata.CreatedAt != first.Metadata.CreatedAt {
		t.Errorf("another volume: %+v", again.Volume)
	}
	_, err = c.Volumes.CreateInstanceIfNotExists(t.Context(), asking("Not_A_Name", 16))
	is(t, err, http.StatusBadRequest)
}

func TestUpdate(t *testing.T) {
	c := sdk(t)
	v := create(t, c, asking(unique("go"), 16))
	sized := func(mb int64) blaxel.VolumeUpdateParams {
		return blaxel.VolumeUpdateParams{Volume: blaxel.VolumeParam{Spec: blaxel.VolumeSpecParam{Size: blaxel.Int(mb)}}}
	}
	grown, err := v.Update(t.Context(), sized(48)) // nothing but a size is sent
	must(t, err)
	if grown.Size() != 48 || grown.Name() != v.Name() || grown.DisplayName() != v.DisplayName() || grown.Region() != region || !reflect.DeepEqual(grown.Metadata.Labels, v.Metadata.Labels) {
		t.Errorf("%+v", grown.Volume)
	}
	renamed, err := c.Volumes.UpdateInstanceMetadata(t.Context(), v.Name(), blaxel.VolumeUpdateMetadataParams{DisplayName: "Renamed", Labels: map[string]string{"env": "prod"}})
	must(t, err)
	if renamed.DisplayName() != "Renamed" || len(renamed.Metadata.Labels) != 1 || renamed.Metadata.Labels["env"] != "prod" || renamed.Size() != 48 {
		t.Errorf("%+v", renamed.Volume)
	}
	_, err = v.Update(t.Context(), sized(16))
	is(t, err, http.StatusBadRequest)
	_, err = c.Volumes.UpdateInstance(t.Context(), "no-such-volume", sized(16))
	is(t, err, http.StatusNotFound)
}

func TestList(t *testing.T) {
	c := sdk(t)
	prefix := unique("list")
	var want []string
	for _, letter := range []string{"b", "c", "a"} {
		want = append(want, create(t, c, asking(prefix+"-"+letter, 16)).Name())
	}
	slices.Sort(want)
	var found []string
	query := blaxel.VolumeListParams{Q: blaxel.String(prefix), Limit: blaxel.Int(1), Sort: blaxel.VolumeListParamsSort("name:asc")}
	page, err := c.Volumes.ListInstances(t.Context(), query)
	for ; page != nil; page, err = page.NextPage(t.Context()) {
		if len(page.Data) != 1 {
			t.Fatalf("a page of %d", len(page.Data))
		}
		v := page.Data[0]
		found = append(found, v.Name())
		if v.Size() != 16 || v.Region() != region || v.Status != "DEPLOYED" || v.Metadata.CreatedAt == "" {
			t.Errorf("%+v", v.Volume)
		}
		if page.HasNextPage() != (page.NextCursor() != "") {
			t.Error("hasMore and nextCursor disagree")
		}
	}
	must(t, err)
	if !slices.Equal(found, want) {
		t.Errorf("page by page: %v, want %v", found, want)
	}
	seen := map[string]int{}
	every := c.Volumes.ListAutoPaging(t.Context(), blaxel.VolumeListParams{Limit: blaxel.Int(1)})
	for every.Next() {
		seen[every.Current().Metadata.Name]++
	}
	must(t, every.Err())
	for name, n := range seen {
		if n != 1 {
			t.Errorf("%s came %d times", name, n)
		}
	}
	for _, name := range want {
		if seen[name] == 0 {
			t.Errorf("%s did not come", name)
		}
	}
	_, err = c.Volumes.List(t.Context(), blaxel.VolumeListParams{Cursor: blaxel.String("x")})
	is(t, err, http.StatusBadRequest)
}

func TestExternalID(t *testing.T) {
	c := sdk(t)
	id := unique("session")
	p := asking(unique("go"), 16)
	p.Volume.Metadata.ExternalID = blaxel.String(id)
	v := create(t, c, p)
	found, err := c.Volumes.GetByExternalID(t.Context(), id)
	must(t, err)
	if found.Metadata.Name != v.Name() || found.Metadata.ExternalID != id {
		t.Errorf("%+v", found)
	}
	page, err := c.Volumes.ListInstances(t.Context(), blaxel.VolumeListParams{ExternalID: blaxel.String(id)})
	must(t, err)
	if len(page.Data) != 1 || page.Data[0].Name() != v.Name() {
		t.Errorf("listed: %s", page.RawJSON())
	}
	must(t, v.Delete(t.Context()))
	_, err = c.Volumes.GetByExternalID(t.Context(), id)
	is(t, err, http.StatusNotFound)
}

func TestDelete(t *testing.T) {
	c := sdk(t)
	v := create(t, c, asking(unique("go"), 16))
	answer, err := c.Volumes.Delete(t.Context(), v.Name())
	must(t, err)
	if answer.Metadata.Name != v.Name() || answer.Status != "DELETING" {
		t.Errorf("%+v", answer)
	}
	deadline := time.Now().Add(30 * time.Second)
	for err == nil {
		if time.Now().After(deadline) {
			t.Fatal("it is there after 30 s")
		}
		_, err = c.Volumes.Get(t.Context(), v.Name())
	}
	is(t, err, http.StatusNotFound)
	is(t, v.Delete(t.Context()), http.StatusNotFound)
}

// TestOddNames: this SDK puts names into the path as they are.
func TestOddNames(t *testing.T) {
	c := sdk(t)
	for _, name := range []string{"a/b", "no such", "..", "x?limit=1", strings.Repeat("x", 300)} {
		_, err := c.Volumes.Get(t.Context(), name)
		is(t, err, http.StatusNotFound)
	}
}

func TestCredentials(t *testing.T) {
	c := sdk(t)
	_, err := c.Volumes.List(t.Context(), blaxel.VolumeListParams{}, option.WithAPIKey("bl_wrong"))
	is(t, err, http.StatusUnauthorized)
}

func TestTemplates(t *testing.T) {
	c := sdk(t)
	name := unique("tpl")
	var answer *http.Response
	made, err := c.VolumeTemplates.Upsert(t.Context(), name, blaxel.VolumeTemplateUpsertParams{
		VolumeTemplate: blaxel.VolumeTemplateParam{
			Metadata: blaxel.MetadataParam{Name: name},
			Spec:     blaxel.VolumeTemplateSpecParam{DefaultSize: blaxel.Int(32)},
		},
		Upload: blaxel.Bool(true),
	}, option.WithResponseInto(&answer))
	must(t, err)
	if made.Spec.DefaultSize != 32 || !strings.HasPrefix(answer.Header.Get("X-Blaxel-Upload-Url"), "http://127.0.0.1:") {
		t.Errorf("%+v, %v", made, answer.Header)
	}
	all, err := c.VolumeTemplates.List(t.Context())
	must(t, err)
	if !slices.ContainsFunc(*all, func(v blaxel.VolumeTemplate) bool { return v.Metadata.Name == name }) {
		t.Errorf("not listed: %+v", *all)
	}
	_, err = c.Volumes.New(t.Context(), blaxel.VolumeNewParams{Volume: blaxel.VolumeParam{
		Metadata: blaxel.MetadataParam{Name: unique("go")},
		Spec:     blaxel.VolumeSpecParam{Size: blaxel.Int(16), Region: blaxel.String(region), Template: blaxel.String("no-such-template:1")},
	}})
	is(t, err, http.StatusBadRequest)
	_, err = c.VolumeTemplates.Delete(t.Context(), name)
	must(t, err)
	_, err = c.VolumeTemplates.Get(t.Context(), name)
	is(t, err, http.StatusNotFound)
}
