package api

// ephemeralFeature is the flag by which Blaxel's clients learn whether sandboxes
// can have ephemeral volumes.
const ephemeralFeature = "generation_mk31"

// FeaturesBody names what is enabled; what is not is left out.
type FeaturesBody struct {
	Features map[string]bool `json:"features"`
}

func listFeatures(c *call) error {
	body := FeaturesBody{Features: map[string]bool{}}
	if c.s.o.Sandboxes != nil {
		body.Features[ephemeralFeature] = true
	}
	return c.json(body)
}
