package api_test

import (
	"strings"
	"testing"

	"holdfast/api"
)

func TestBadVolumeRequests(t *testing.T) {
	w := newWorld(t)
	w.request("POST /v0/volumes", `{"metadata":{"name":"there"},"spec":{"size":1024}}`).is(200)
	spec := func(s string) string { return `{"metadata":{"name":"v"},"spec":` + s + `}` }
	meta := func(s string) string { return `{"metadata":` + s + `,"spec":{"size":1}}` }
	for name, c := range map[string]struct{ body, says string }{
		"size zero":          {spec(`{"size":0}`), "spec.size: must be at least 1 (MiB), not 0"},
		"size negative":      {spec(`{"size":-1}`), "spec.size: must be at least 1"},
		"size very negative": {spec(`{"size":-99999999999999999999}`), "spec.size: must be at least 1"},
		"size fractional":    {spec(`{"size":1.5}`), "spec.size: must be a whole number"},
		"size with exponent": {spec(`{"size":1e3}`), "spec.size: must be a whole number"},
		"size text":          {spec(`{"size":"1024"}`), "spec.size: must be a whole number"},
		"size object":        {spec(`{"size":{}}`), "spec.size: must be a whole number"},
		"size bool":          {spec(`{"size":true}`), "spec.size: must be a whole number"},
		"8 EiB":              {spec(`{"size":8796093022208}`), "spec.size: is in MiB; 8796093022208 is more than"},
		"over int64":         {spec(`{"size":9223372036854775808}`), "spec.size: is in MiB"},
		"over the maximum":   {spec(`{"size":8796093022207}`), "spec.size"},
		"over the pool":      {spec(`{"size":10000000}`), ""},
		"below xfs":          {spec(`{"size":100,"filesystem":"xfs"}`), "spec.size"},
		"unknown filesystem": {spec(`{"size":1,"filesystem":"ntfs"}`), "spec.filesystem"},
		"unknown template":   {spec(`{"template":"nope"}`), "spec.template"},
		"template's form":    {spec(`{"template":"../x:1"}`), "spec.template"},
		"region number":      {spec(`{"region":7}`), "spec.region: must be a string, not number"},
		"spec array":         {`{"metadata":{"name":"v"},"spec":[]}`, "spec: must be an object, not array"},
		"name upper case":    {meta(`{"name":"Vol"}`), "metadata.name"},
		"name empty":         {meta(`{"name":""}`), "metadata.name"},
		"name path":          {meta(`{"name":"../etc"}`), "metadata.name"},
		"name slash":         {meta(`{"name":"a/b"}`), "metadata.name"},
		"name too long":      {meta(`{"name":"` + strings.Repeat("a", 50) + `"}`), "metadata.name"},
		"name begins with -": {meta(`{"name":"-a"}`), "metadata.name"},
		"name newline":       {meta(`{"name":"a\n"}`), "metadata.name"},
		"name reserved":      {meta(`{"name":"by-external-id"}`), "metadata.name"},
		"name number":        {meta(`{"name":5}`), "metadata.name: must be a string, not number"},
		"label number":       {meta(`{"name":"v","labels":{"a":1}}`), "metadata.labels"},
		"labels array":       {meta(`{"name":"v","labels":[]}`), "metadata.labels: must be an object"},
		"display name long":  {meta(`{"name":"v","displayName":"` + strings.Repeat("x", 64) + `"}`), "metadata.displayName"},
		"external id long":   {meta(`{"name":"v","externalId":"` + strings.Repeat("x", 65) + `"}`), "metadata.externalId"},
		"external id spaces": {meta(`{"name":"v","externalId":"has spaces!"}`), "metadata.externalId"},
		"not JSON":           {`{"metadata":`, "body: is not valid JSON"},
		"trailing":           {`{"metadata":{"name":"v"}} {}`, "body: is not valid JSON"},
		"not UTF-8":          {meta("{\"name\":\"v\",\"displayName\":\"caf\xe9\"}"), "body: is not valid UTF-8 (at byte 43)"},
		"key is not UTF-8":   {meta("{\"name\":\"v\",\"labels\":{\"\xff\":\"\"}}"), "body: is not valid UTF-8"},
		"surrogate encoded":  {meta("{\"name\":\"v\",\"displayName\":\"\xed\xa0\xbd\"}"), "body: is not valid UTF-8"},
		"first half alone":   {meta(`{"name":"v","displayName":"\ud83d"}`), "body: has half a surrogate pair"},
		"first half twice":   {meta(`{"name":"v","displayName":"\ud83d\ud83d"}`), "body: has half a surrogate pair"},
		"second half first":  {meta(`{"name":"v","displayName":"\ude80\ud83d"}`), "body: has half a surrogate pair"},
		"array":              {`[]`, "body: must be a JSON object"},
		"null":               {`null`, "body: must be a JSON object"},
		"empty":              {``, "body: must be a JSON object"},
		"deep":               {strings.Repeat(`{"a":`, 20000) + "1" + strings.Repeat("}", 20000), "body: is not valid JSON"},
	} {
		t.Run(name, func(t *testing.T) {
			r := w.request("POST /v0/volumes", c.body)
			if r.Code < 400 || r.Code >= 500 || !strings.Contains(into[api.ErrorBody](r).Message, c.says) {
				t.Fatalf("%d %s, want a 4xx that says %q", r.Code, r.Body, c.says)
			}
			if r.Header.Get("X-Should-Retry") != "false" {
				t.Error("a client may repeat what cannot pass")
			}
			w.request("GET /v0/volumes/v", nil).is(404) // nothing half-made
		})
	}
	for name, c := range map[string]struct{ body, says string }{
		"shrink":             {`{"spec":{"size":512}}`, "current size is 1024"},
		"rename":             {`{"metadata":{"name":"other"}}`, "metadata.name: cannot be changed"},
		"another region":     {`{"spec":{"region":"eu-lon-1"}}`, "spec.region"},
		"another type":       {`{"spec":{"filesystem":"xfs"}}`, "spec.filesystem"},
		"another template":   {`{"spec":{"template":"demo"}}`, "spec.template"},
		"size text":          {`{"spec":{"size":"2048"}}`, "spec.size"},
		"external id odd":    {`{"metadata":{"externalId":"a b"}}`, "metadata.externalId"},
		"empty":              {``, "body: must be a JSON object"},
		"label not a string": {`{"metadata":{"labels":{"a":{}}}}`, "metadata.labels"},
	} {
		w.request("PUT /v0/volumes/there", c.body).refused(400, "INVALID_REQUEST", c.says)
		if t.Failed() {
			t.Fatal(name)
		}
	}
	if v := into[api.Volume](w.request("GET /v0/volumes/there", nil).is(200)); v.Spec.Size != 1024 || len(v.Events) != 1 {
		t.Errorf("changed by a refused request: %+v", v)
	}
}

func TestOddButFineVolumeRequests(t *testing.T) {
	w := newWorld(t)
	for name, body := range map[string]string{
		"unknown fields":   `{"metadata":{"name":"a1","plan":"x","url":{},"future":[1]},"spec":{"size":1,"infrastructureId":5},"status":null,"events":7,"state":"x"}`,
		"nulls":            `{"metadata":{"name":"a2","displayName":null,"labels":null,"externalId":null},"spec":{"size":null,"region":null,"template":null,"filesystem":null}}`,
		"no spec":          `{"metadata":{"name":"a3"}}`,
		"space around":     " \n{\"metadata\":{\"name\":\"a4\"},\"spec\":{\"size\":1}}\n ",
		"free text region": `{"metadata":{"name":"a5"},"spec":{"size":1,"region":"eu-dub-1"}}`,
		"escaped":          `{"metadata":{"name":"a7","displayName":"\ud83d\ude80 \\ud83d \ufffd �"},"spec":{"size":1}}`,
		"emoji":            `{"metadata":{"name":"a6","displayName":"café 日本語 🚀","labels":{"a b/c":"🚀"}},"spec":{"size":1}}`,
	} {
		if w.request("POST /v0/volumes", body).is(200); t.Failed() {
			t.Fatal(name)
		}
	}
	// The document asks for application/json; curl -d says that it is a form, and is
	// understood all the same.
	send(t, w.server.Handler(), "POST /v0/volumes", newVolume("b1", nil), "Content-Type: ", "Authorization: Bearer "+adminKey).is(200)
	w.request("POST /v0/volumes", newVolume("b2", nil), "Content-Type: application/json; charset=utf-8").is(200)
	send(t, w.server.Handler(), "POST /v0/volumes", newVolume("b3", nil), "Content-Type: application/x-www-form-urlencoded", "Authorization: Bearer "+adminKey).is(200)
	w.request("PUT /v0/volumes/a6", `{"metadata":{"labels":{},"displayName":""}}`).is(200)
	if v := into[api.Volume](w.request("GET /v0/volumes/a7", nil).is(200)); v.Metadata.DisplayName != "🚀 \\ud83d � �" {
		t.Errorf("named %q", v.Metadata.DisplayName)
	}
	if v := into[api.Volume](w.request("GET /v0/volumes/a6", nil).is(200)); len(v.Metadata.Labels) != 0 || v.Metadata.DisplayName != "" {
		t.Errorf("given and empty is not absent: %+v", v.Metadata)
	}
}

func TestBodyLimit(t *testing.T) {
	w := newWorld(t)
	big := `{"metadata":{"name":"big","displayName":"` + strings.Repeat("x", 1<<20) + `"}}`
	r := w.request("POST /v0/volumes", big).refused(413, "BODY_TOO_LARGE", "1048576 bytes")
	if r.Header.Get("Connection") != "close" {
		t.Error("the rest of the body would be read")
	}
}

func TestNamesInPaths(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"UPPER", "a%2Fb", "%2E%2E", "..%2F..%2Fetc", "a%00b", "-a", "a%20b", strings.Repeat("a", 50), "by-external-id", "%F0%9F%9A%80"} {
		for _, method := range []string{"GET", "PUT", "DELETE"} {
			w.request(method+" /v0/volumes/"+name, `{"spec":{"size":1}}`).refused(404, "NOT_FOUND", "")
		}
		w.request("GET /v0/volumes/"+name+"/attachments", nil).refused(404, "NOT_FOUND", "")
		w.request("GET /v0/volume_templates/"+name, nil).refused(404, "NOT_FOUND", "")
	}
	w.request("PUT /v0/volume_templates/UPPER", `{}`).refused(400, "INVALID_REQUEST", "metadata.name")
	w.request("GET /v0/volumes/by-external-id/attachments", nil).refused(404, "NOT_FOUND", "")
	w.request("GET /v0/volumes/by-external-id/a%2Fb", nil).refused(404, "NOT_FOUND", "")
}
