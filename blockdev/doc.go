// Package blockdev is the mechanism of block images on one host. It knows
// images, devices, pools and openings; it knows no tenant, no template and no
// database.
//
// # Words
//
//   - image: the bytes of a volume or revision inside a backend.
//   - backend: a kind of place for images; pool: one configured instance of it.
//   - draft: an image that is being made; it becomes an image by being published.
//   - description: a small document beside the image that says what it is, so
//     that the image explains itself when every database is lost. The backend
//     keeps it durably and verifies it; its content is the caller's business.
//   - device: an active image on this host, a file or a block node.
//   - opening: one use of an image, named by its lease. What the kernel can be
//     asked (is it open, how large is it) is asked, never stored.
//   - quarantine: where an unexplained image is kept; nothing is deleted that
//     cannot be proven to be ours.
//
// # Rooms
//
// sparse keeps images as sparse files in a pool directory; loop makes block
// devices of files, nbddevice of NBD servers; filesystem makes, checks, grows and identifies ext4, XFS and
// btrfs; extent maps and copies the data of sparse files; attach makes a device
// visible in a sandbox; serve is what a worker serves an image by (vhost for
// virtual machines, nbd, overlay for layers); blockdevtest holds the contract that every Backend
// passes and a Backend in memory that can fail at any step.
package blockdev
