// Package apitest is for tests of and over the HTTP API: it holds every request
// and answer that passes against the OpenAPI document.
package apitest
