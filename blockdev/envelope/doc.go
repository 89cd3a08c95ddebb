// Package envelope seals the descriptions that stand beside images: a header line
// that names the image, and the payload with its length and checksum. What was
// damaged, cut, exchanged or written by another version is noticed when it is read.
package envelope
