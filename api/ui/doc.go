// Package ui holds the page at /ui: one HTML file with its style and script in
// it, which asks the API for everything that it shows, with the key that its user
// types in. The page itself holds no data and no secret, so it is served to
// anybody; it may load nothing and speak to nobody but the server it came from.
package ui
