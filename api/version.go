package api

// version is the behaviour that a client asks for by Blaxel-Version. Versions
// are dates, so they compare as text.
type version string

const (
	version1 version = "2026-04-16" // also without the header
	version2 version = "2026-04-28" // paginated listings
)

func parseVersion(header string) (version, error) {
	switch v := version(header); v {
	case "":
		return version1, nil
	case version1, version2:
		return v, nil
	}
	return "", refuse(ErrBadVersion, "Unknown API version %q. Valid versions: %s, %s. "+
		"See https://docs.blaxel.ai/api-reference/introduction#api-versioning for the list of supported versions.",
		clip(header, 32), version1, version2)
}
