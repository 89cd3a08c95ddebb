// Package sdktest has the tests that drive a real holdfastd with the client
// libraries of Blaxel, unmodified, as their registries serve them. There is no
// code here besides the tests: what the clients are told, and what must come of
// it, is in testdata, in each client's own language.
package sdktest
