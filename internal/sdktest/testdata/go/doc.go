// Package gosdk drives a holdfastd with github.com/blaxel-ai/sdk-go. It is a
// module of its own, so that the SDK stays out of the graph of holdfast, and is
// run by the tests of holdfast/internal/sdktest.
package gosdk
