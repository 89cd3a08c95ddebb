package firecracker

import (
	"encoding/json"

	"holdfast/blockdev/attach"
)

// Document is the Drive of Firecracker's API for a request's volume: the body of PUT
// /drives/ID before boot, or an item of "drives" in a configuration file.
// blockdev.ErrInvalid for another engine than Sync and Async.
func Document(r attach.Request, engine string) (json.RawMessage, error) {
	a, err := New(nil, engine)
	if err != nil {
		return nil, err
	}
	return json.Marshal(a.drive(r))
}
