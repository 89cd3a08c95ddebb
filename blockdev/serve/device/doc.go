// Package device is what the servers of this tree have in common of what they serve:
// a plain file or block device, ways to use other devices' files directly, and what
// they all need to move bytes. What a server asks of a device beyond that (layers, in
// tests devices that fail) is an interface of its own.
package device
