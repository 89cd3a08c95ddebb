// Package device is a plain file or block device as something that the servers of
// this tree serve, and what they all need to move its bytes. What else they serve
// (layers, in tests devices that fail) is an interface of their own.
package device
