package engine

import (
	"slices"

	"holdfast/blockdev"
)

// VolumesOf tells which volumes of a workspace were made from which template
// revision, by name.
func (e *Engine) VolumesOf(workspace string) map[blockdev.ID][]string {
	made := map[blockdev.ID][]string{}
	e.catalog.each(func(v Volume) {
		if v.Workspace == workspace && v.Revision != "" && v.Phase != Deleting {
			made[v.Revision] = append(made[v.Revision], v.Name)
		}
	})
	for _, names := range made {
		slices.Sort(names)
	}
	return made
}

// Awaited tells the template revisions that volumes still have to be filled from.
func (e *Engine) Awaited() map[blockdev.ID]bool {
	waiting := map[blockdev.ID]bool{}
	e.catalog.each(func(v Volume) {
		if v.Revision != "" && (v.Phase == Allocating || v.Phase == Hydrating) {
			waiting[v.Revision] = true
		}
	})
	return waiting
}
