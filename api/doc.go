// Package api is the HTTP server: routes, wire types, the one table from
// sentinels to answers, pagination and the OpenAPI document. It decides nothing
// about volumes: a handler decodes, calls the engine or the library, encodes.
package api
