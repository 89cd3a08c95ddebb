package ext4fill

// SharedHashes gives, of the names of an indexed directory, those whose hash goes
// on from one block into the next, and the blocks' number.
func SharedHashes(texts []string, seed [4]uint32, blockSize int64) (shared []string, blocks int) {
	names := make([]name, len(texts))
	for i, text := range texts {
		names[i] = name{text: text}
	}
	sorted := sortByHash(names, hasher{seed: seed})
	cut := leaves(sorted, leafRoom(blockSize))
	for i, l := range cut {
		if l.hash&1 != 0 {
			first := cut[i-1].end
			shared = append(shared, sorted[first-1].text, sorted[first].text)
		}
	}
	return shared, len(cut)
}
