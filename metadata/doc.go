// Package metadata keeps the node's records: Badger behind typed tables. An
// Update is durable when it returns; after a failed commit the store answers
// ErrFailed to every later Update and tells its owner, who must end the process
// (fail-stop). It knows nothing of volumes: tables are typed by their users.
package metadata
