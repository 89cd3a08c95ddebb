package api

// Patterns are the routes that the server serves.
func Patterns() (all []string) {
	for _, r := range allRoutes() {
		all = append(all, r.pattern)
	}
	return all
}
