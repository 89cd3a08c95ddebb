package daemon

import "path/filepath"

// layout names everything below the state directory.
type layout struct{ dir string }

func (l layout) path(name string) string { return filepath.Join(l.dir, name) }

func (l layout) metadata() string  { return l.path("meta") }                       // the metadata's own file system, where it has one
func (l layout) store() string     { return filepath.Join(l.metadata(), "store") } // the record store
func (l layout) sequence() string  { return l.path("sequence") }                   // the store's floor, on another file system than the store
func (l layout) sideLog() string   { return l.path("sidelog") }                    // keys, quotas, template heads
func (l layout) audit() string     { return l.path("audit/audit.log") }            // every mutation
func (l layout) secret() string    { return l.path("signing.key") }                // signs cursors and upload URLs
func (l layout) clean() string     { return l.path("clean") }                      // the process before stopped in order
func (l layout) host() string      { return l.path("host") }                       // this host's id
func (l layout) stage() string     { return l.path("mounts") }                     // volumes are mounted here once
func (l layout) backups() string   { return l.path("backups") }                    // of the records
func (l layout) attach() string    { return l.path("attach") }                     // host targets with --dev
func (l layout) vmStart() string   { return l.path("vm") }                         // paths of volumes for machines that are to be started
func (l layout) devKey() string    { return l.path("dev.key") }                    // the admin key of --dev
func (l layout) listen() string    { return l.path("listen") }                     // the address chosen for port 0
func (l layout) sandboxes() string { return l.path("sandboxes") }                  // images of the sandbox runtime
