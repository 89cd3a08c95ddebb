// Package browsertest looks at the page at /ui as its users do: in a real
// browser (chromium, without a screen), against a real daemon.
package browsertest
