package templates

import (
	"fmt"
	"regexp"
	"strings"
)

// LatestVersion is the word for the newest READY revision.
const LatestVersion = "latest"

// Reference names a revision: "name", "name:latest", "name:3" or "name:version".
type Reference struct {
	Name    string
	Version string // as written; "" when there was none
}

var (
	nameForm    = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,47}[a-z0-9])?$`)
	versionForm = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
)

// ParseReference reads a reference; ErrInvalid for one that can name nothing.
func ParseReference(s string) (Reference, error) {
	name, version, versioned := strings.Cut(s, ":")
	if !nameForm.MatchString(name) || versioned && !versionForm.MatchString(version) {
		return Reference{}, fmt.Errorf(`%w: a template is named "name", "name:latest" or "name:N"`, ErrInvalid)
	}
	return Reference{Name: name, Version: version}, nil
}
