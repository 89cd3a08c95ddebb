package vmmtest

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/getkin/kin-openapi/openapi2"
	"github.com/getkin/kin-openapi/openapi2conv"
	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"
	"sigs.k8s.io/yaml"
)

//go:embed testdata/*.yaml
var documents embed.FS

// document holds requests and answers against an API document.
type document struct{ router routers.Router }

func load(name string) (*document, error) {
	text, err := documents.ReadFile("testdata/" + name)
	if err != nil {
		return nil, err
	}
	read := openapi3.NewLoader().LoadFromData
	if name == "firecracker.yaml" {
		read = convert // it is Swagger 2
	}
	doc, err := read(text)
	if err != nil {
		return nil, err
	}
	router, err := gorillamux.NewRouter(doc)
	return &document{router}, err
}

func convert(text []byte) (*openapi3.T, error) {
	text, err := yaml.YAMLToJSON(text)
	if err != nil {
		return nil, err
	}
	var old openapi2.T
	if err := json.Unmarshal(text, &old); err != nil {
		return nil, err
	}
	return openapi2conv.ToV3(&old)
}

// request checks one, and closes the schemas that the documents leave open: a field
// that the document does not name is a mistake of ours.
func (d *document) request(r *http.Request, body []byte) (*openapi3filter.RequestValidationInput, error) {
	asked := r.Clone(context.Background())
	asked.URL.Scheme, asked.URL.Host = "http", "localhost"
	asked.Host = "localhost"
	route, params, err := d.router.FindRoute(asked)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", r.Method, r.URL.Path, err)
	}
	asked.Body = io.NopCloser(bytes.NewReader(body))
	in := &openapi3filter.RequestValidationInput{Request: asked, PathParams: params, Route: route, Options: &openapi3filter.Options{
		IncludeResponseStatus: true, SkipSettingDefaults: true,
	}}
	if err := openapi3filter.ValidateRequest(context.Background(), in); err != nil {
		return in, fmt.Errorf("%s %s: %w", r.Method, r.URL.Path, err)
	}
	if b := route.Operation.RequestBody; b != nil && len(body) > 0 {
		var value any
		if err := json.Unmarshal(body, &value); err != nil {
			return in, err
		}
		if err := closed(b.Value.Content.Get("application/json").Schema.Value, value, r.URL.Path); err != nil {
			return in, err
		}
	}
	return in, nil
}

// closed refuses fields that a schema does not name.
func closed(schema *openapi3.Schema, value any, at string) error {
	fields, ok := value.(map[string]any)
	if !ok || len(schema.Properties) == 0 {
		return nil
	}
	var all []error
	for name, v := range fields {
		if p := schema.Properties[name]; p == nil {
			all = append(all, fmt.Errorf("%s has no field %q", at, name))
		} else {
			all = append(all, closed(p.Value, v, at+"."+name))
		}
	}
	return errors.Join(all...)
}

// answer checks one to a request that was checked.
func (d *document) answer(in *openapi3filter.RequestValidationInput, status int, header http.Header, body []byte) error {
	return openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: status, Header: header, Body: io.NopCloser(bytes.NewReader(body)), Options: in.Options,
	})
}
