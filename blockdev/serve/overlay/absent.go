package overlay

import "holdfast/blockdev"

// Absent tells how many bytes of a base of these chunks, those of zeroes not counted, the
// layer with this map does not hold, at most. blockdev.ErrCorrupt for a map that is none.
func (c Chunks) Absent(f File) (int64, error) {
	m, err := loadMap(f)
	if err != nil {
		return 0, blockdev.Op("overlay.Absent", "", err)
	}
	var lacking int64
	for i := range c.count() {
		if c.zero(i) {
			continue
		}
		from := i * c.Chunk
		first, end := from/BlockSize, min(blocksOf(from+c.length(i)), blocksOf(m.size))
		for first < end {
			held, to := m.bits.run(first, end)
			if !held {
				lacking += to - first
			}
			first = to
		}
	}
	return lacking * BlockSize, nil
}
