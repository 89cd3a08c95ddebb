// Package registrytest runs a real registry server, Debian's docker-registry
// (CNCF Distribution), on a loopback port of its own, and puts images into it.
package registrytest
