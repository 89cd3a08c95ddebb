// Package vmguest asks the agent inside a virtual machine (attach.Guest), for the
// Attachers of VMMs. It goes through the socket that a target names: below the
// directories that the operator allows, and of the VMM's own process, each time. One
// connection serves one request, so that requests for several volumes of a machine
// take turns and what one leaves behind is the next one's to pass over.
package vmguest
