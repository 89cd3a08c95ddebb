package templates

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Limits of what a user may write, from the contract where it gives one; labels
// as those of volumes.
const (
	maxDisplayName    = 63 // characters
	maxDescription    = 1024
	maxLabels         = 64
	maxLabelKey       = 63  // bytes
	maxLabelValue     = 255 // bytes
	maxDefaultSizeMiB = 64 << 20
)

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrInvalid, fmt.Errorf(format, args...))
}

func checkName(name string) error {
	if !nameForm.MatchString(name) {
		return invalid("metadata.name: must be 1 to 49 lower-case letters, digits and hyphens, beginning and ending with a letter or digit")
	}
	return nil
}

func (c Change) check() error {
	if c.DisplayName != nil && !isText(*c.DisplayName, maxDisplayName) {
		return invalid("metadata.displayName: must be at most %d characters of UTF-8", maxDisplayName)
	}
	if c.Description != nil && !isText(*c.Description, maxDescription) {
		return invalid("spec.description: must be at most %d characters of UTF-8", maxDescription)
	}
	if c.DefaultSizeMiB != nil && (*c.DefaultSizeMiB < 1 || *c.DefaultSizeMiB > maxDefaultSizeMiB) {
		return invalid("spec.defaultSize: must be 1 to %d MB", maxDefaultSizeMiB)
	}
	if c.KeepVersions != nil && (*c.KeepVersions < 0 || *c.KeepVersions > maxKeptVersions) {
		return invalid("spec.retention.versions: must be 1 to %d, or 0 for the node's own", maxKeptVersions)
	}
	if c.KeepDays != nil && (*c.KeepDays < 0 || *c.KeepDays > maxKeptDays) {
		return invalid("spec.retention.days: must be 1 to %d, or 0 for the node's own", maxKeptDays)
	}
	return checkLabels(c.Labels)
}

func isText(s string, most int) bool {
	return utf8.ValidString(s) && utf8.RuneCountInString(s) <= most && strings.IndexByte(s, 0) < 0
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return invalid("metadata.labels: must be at most %d labels", maxLabels)
	}
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		if key == "" || len(key) > maxLabelKey || !utf8.ValidString(key) || strings.ContainsAny(key, "=\x00") {
			return invalid("metadata.labels: key %.70q must be 1 to %d bytes of UTF-8 without '='", key, maxLabelKey)
		}
		if value := labels[key]; len(value) > maxLabelValue || !utf8.ValidString(value) || strings.IndexByte(value, 0) >= 0 {
			return invalid("metadata.labels: the value of %q must be at most %d bytes of UTF-8", key, maxLabelValue)
		}
	}
	return nil
}

// checkVersion checks the name for revision number n that a caller gave. A name
// that looks like a number must be its own, so that "name:3" has one meaning.
func checkVersion(version string, n int) error {
	if !versionForm.MatchString(version) {
		return invalid("version: must be 1 to 63 letters, digits, dots, underscores and hyphens, beginning and ending with a letter or digit")
	}
	if version == LatestVersion {
		return invalid("version: %q always means the newest one", LatestVersion)
	}
	if strings.Trim(version, "0123456789") == "" && version != strconv.Itoa(n) {
		return invalid("version: a number must be the version's own, which is %d", n)
	}
	return nil
}
