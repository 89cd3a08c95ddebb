package engine

import (
	"context"
	"fmt"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/metadata"
)

// SeedRecords writes records of n volumes that have no images, one second apart
// up to now: what listings and an idle daemon are measured with. A daemon that
// starts on them shows the volumes as FAILED. Never on a store in use.
func SeedRecords(ctx context.Context, store *metadata.Store, workspace string, n int, now time.Time) error {
	const batch = 500
	for first := 0; first < n; first += batch {
		err := store.Update(ctx, func(tx *metadata.Tx) error {
			for i := first; i < min(first+batch, n); i++ {
				at := now.Add(time.Duration(i-n) * time.Second).UTC().Round(0)
				v := Volume{
					ID: newID(blockdev.PrefixVolume, at), Sequence: 2, Workspace: workspace, Name: fmt.Sprintf("seeded-%06d", i),
					DisplayName: fmt.Sprintf("Seeded %d", i), Labels: map[string]string{"env": "bench", "shard": fmt.Sprint(i % 16)},
					Region: "local", SizeMiB: 1, Filesystem: filesystem.Ext4, UUID: newUUID(), Phase: Ready, CreatedAt: at, UpdatedAt: at,
					Events: []Event{{Type: "deployment", Status: StatusDeployed, Message: "Volume is ready", Time: at}},
				}
				if err := volumesTable.Put(tx, string(v.ID), v); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
