package firecracker

import (
	"encoding/json"

	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/vmsocket"
)

// Document is the Drive of Firecracker's API for a request's volume: the body of PUT
// /drives/ID before boot, or an item of "drives" in a configuration file.
// blockdev.ErrInvalid for another engine than Sync and Async, errors.ErrUnsupported for
// limits that it does not have, see Explain.
func Document(r attach.Request, engine string) (json.RawMessage, error) {
	a, err := New(nil, engine)
	if err != nil {
		return nil, err
	}
	d := a.drive(r)
	if d.Rates, err = vmsocket.Given(r.Limits, r.ReadOnly); err != nil {
		return nil, err
	}
	return json.Marshal(d)
}
