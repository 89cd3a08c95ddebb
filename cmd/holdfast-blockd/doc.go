// Command holdfast-blockd serves one volume to one virtual machine by
// vhost-user-blk. It opens nothing: descriptor 3 is the image, opened with O_DIRECT
// and locked by whoever starts it, descriptor 4 a listening unix socket.
//
//	holdfast-blockd -serial vol-… [-queues 4] [-read-only] [-user 65534] [-group 65534]
//
// It can gain no privileges, and gives up its user and group if told to. SIGHUP
// makes it look for a new size of the image and tell the guest. SIGTERM makes it
// finish what has begun and end; the VMM keeps what has not, and connects to the
// next one that listens on the same socket. It lives on when its parent ends.
package main
