// Package nbddevice makes block devices of NBD servers with the kernel's NBD client, as
// package loop makes them of files.
//
// A device is known by its backend, a text that whoever makes it chooses and the kernel
// keeps (/sys/block/nbdN/backend), never by its number: numbers belong to the whole
// host and change hands. A backend is to be one opening's alone. Every function that
// changes a device says the backend to the kernel, or has the device open while it
// compares: what is somebody else's is left alone.
//
// A device outlives the process that made it, and its server as well: requests wait
// until Reconnect has given it another connection, and what was on its way is sent
// again then. It does not outlive the host. Nothing in the kernel keeps two devices from
// one backend, so callers hold a lock of their own while they look for one and make one.
package nbddevice
