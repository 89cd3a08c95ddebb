// Package cloudhypervisor attaches volumes to virtual machines of Cloud Hypervisor by
// the VMM's API socket: target {type: "cloud-hypervisor", socket}, below a directory
// that the operator allows.
//
// A disk is added to a VM that was created, whether it runs or not, and removed from
// it. The VMM answers to a removal before the guest has let the disk go, and its
// configuration lacks the disk from then on; so a volume has left only when the device
// is out of the VMM's device tree and no descriptor of the process means the image.
// A guest that does not answer in time leaves the removal pending: Detach is busy, and
// asks again when it is repeated.
//
// Every disk is given image_type Raw. A VMM that does not know that field would guess
// the format from bytes that a tenant has written, and could be made to read any file
// of this host (GHSA-jmr4-g2hv-mjj6): versions before 51 are refused. Disks are opened
// with O_DIRECT. A disk that a worker serves is a vhost-user socket: the guest's memory
// must be shared, and a growth is seen at the next attach. The guest finds a volume by its serial number, see Serial.
package cloudhypervisor
