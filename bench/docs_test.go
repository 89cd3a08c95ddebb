package bench

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestPageHasItsMarks: the page in docs can be written, and its charts are there.
func TestPageHasItsMarks(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "docs", "performance.md"))
	if err != nil {
		t.Fatal(err)
	}
	page := string(text)
	if strings.Count(page, pageBegin) != 1 || strings.Count(page, pageEnd) != 1 || strings.Index(page, pageBegin) > strings.Index(page, pageEnd) {
		t.Error("the marks are not there, once and in their order")
	}
	for line := range strings.Lines(page) {
		if _, rest, ok := strings.Cut(line, "]("); ok && strings.HasPrefix(line, "![") {
			file, _, _ := strings.Cut(rest, ")")
			if _, err := os.Stat(filepath.Join("..", "docs", file)); err != nil {
				t.Error(err)
			}
		}
	}
}
