package engine

import (
	"errors"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"holdfast/blockdev/filesystem"
)

// Limits of what a user may write, from the contract where it gives one.
const (
	maxNameLength        = 49
	maxDisplayNameLength = 63 // characters
	maxExternalIDLength  = 64
	maxLabels            = 64
	maxLabelKeyLength    = 63  // bytes
	maxLabelValueLength  = 255 // bytes
	maxRegionLength      = 63
	maxEvents            = 20
	maxAttachments       = 1000
	// DefaultSizeMiB is the size of a volume when neither the request nor its
	// template gives one.
	DefaultSizeMiB = 1024
	// hardMaxSizeMiB is 64 TiB: beyond it ext4 and loop arithmetic get exotic.
	hardMaxSizeMiB = 64 << 20
)

var (
	nameForm       = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,47}[a-z0-9])?$`)
	externalIDForm = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)
	regionForm     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	holderForm     = regexp.MustCompile(`^(sandbox|agent):[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
)

func checkName(name string) error {
	if !nameForm.MatchString(name) {
		return problem(ErrInvalid, "metadata.name", "must be 1 to %d lower-case letters, digits and hyphens, beginning and ending with a letter or digit", maxNameLength)
	}
	return nil
}

func checkDisplayName(s string) error {
	if !utf8.ValidString(s) || utf8.RuneCountInString(s) > maxDisplayNameLength {
		return problem(ErrInvalid, "metadata.displayName", "must be at most %d characters of UTF-8", maxDisplayNameLength)
	}
	return nil
}

func checkExternalID(s string) error {
	if s != "" && !externalIDForm.MatchString(s) {
		return problem(ErrInvalid, "metadata.externalId", "must be at most %d letters, digits and hyphens", maxExternalIDLength)
	}
	return nil
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return problem(ErrInvalid, "metadata.labels", "must be at most %d labels", maxLabels)
	}
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		value := labels[key]
		if key == "" || len(key) > maxLabelKeyLength || !utf8.ValidString(key) || strings.ContainsAny(key, "=\x00") {
			return problem(ErrInvalid, "metadata.labels", "key %.70q must be 1 to %d bytes of UTF-8 without '='", key, maxLabelKeyLength)
		}
		if len(value) > maxLabelValueLength || !utf8.ValidString(value) || strings.Contains(value, "\x00") {
			return problem(ErrInvalid, "metadata.labels", "the value of %q must be at most %d bytes of UTF-8", key, maxLabelValueLength)
		}
	}
	return nil
}

func checkHolder(s string) error {
	if !holderForm.MatchString(s) {
		return problem(ErrInvalid, "holder", `must be "sandbox:NAME" or "agent:NAME" with a name of lower-case letters, digits and hyphens`)
	}
	return nil
}

func (e *Engine) checkRegion(s string) (string, error) {
	if s == "" {
		return e.o.DefaultRegion, nil
	}
	if len(e.o.Regions) > 0 && !slices.Contains(e.o.Regions, s) {
		return "", problem(ErrInvalid, "spec.region", "unknown region %.70q: this server has %s", s, strings.Join(e.o.Regions, ", "))
	}
	if !regionForm.MatchString(s) {
		return "", problem(ErrInvalid, "spec.region", "must be 1 to %d letters, digits, dots, underscores and hyphens", maxRegionLength)
	}
	return s, nil
}

func checkFilesystem(s string) (filesystem.Type, error) {
	if s == "" {
		return filesystem.Ext4, nil
	}
	if t := filesystem.Type(s); t.Valid() {
		return t, nil
	}
	return "", problem(ErrInvalid, "spec.filesystem", "must be ext4, xfs, btrfs or none")
}

func (e *Engine) checkSize(mib int64, t filesystem.Type) error {
	if mib < 1 {
		return problem(ErrInvalid, "spec.size", "must be at least 1 MB")
	}
	if mib > hardMaxSizeMiB {
		return problem(ErrInvalid, "spec.size", "must be at most %d MB", hardMaxSizeMiB)
	}
	if mib > e.o.MaxSizeMiB {
		return problem(ErrQuota, "spec.size", "%d MB exceeds maximum allowed size %d MB", mib, e.o.MaxSizeMiB)
	}
	if least := t.Minimum() / filesystem.MiB; mib < least {
		return problem(ErrInvalid, "spec.size", "the minimum size of filesystem %s is %d MB", t, least)
	}
	return nil
}

// isProblem reports whether err is meant for the user as it is.
func isProblem(err error) bool {
	var p *Problem
	return errors.As(err, &p)
}
