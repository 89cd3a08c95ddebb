// Package metadata keeps the node's records: Badger behind typed tables, and a
// side log for the few facts that must survive the loss of the database. It
// knows nothing of volumes: tables are typed by their users.
//
// An Update is durable when it returns. Updates run one after the other and
// share a synced commit when several wait (batch.go). After a failed commit the
// store answers ErrFailed to everything and tells its owner, who must end the
// process (fail-stop); what Badger only logs counts as a failed commit.
//
// Every commit carries a sequence and a sum over all records (head.go). Open
// reads everything and refuses a store that went back or lost records:
// ErrRolledBack or ErrDamaged, and it has to be rebuilt or restored.
//
// Files in the store's directory: records/ (Badger's), lock (held while open,
// with the process id) and, unless it is kept elsewhere, sequence (the floor
// that the sequence must not be below).
package metadata
