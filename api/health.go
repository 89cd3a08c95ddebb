package api

// Health is the body of /healthz and /readyz.
type Health struct {
	Status  string `json:"status"`
	Version string `json:"version,omitempty"`
}

// healthz says that the process answers.
func healthz(c *call) error { return c.json(Health{Status: "ok", Version: c.s.o.Version}) }

// readyz says that the daemon does its work: /v0 would be answered.
func readyz(c *call) error {
	if c.s.draining.Load() {
		return refuse(ErrDraining, "not ready: stopping")
	}
	if c.s.o.Ready != nil {
		if err := c.s.o.Ready(c.r.Context()); err != nil {
			return refuse(ErrDraining, "not ready: %v", err)
		}
	}
	return c.json(Health{Status: "ready", Version: c.s.o.Version})
}

func serveMetrics(c *call) error {
	if c.s.o.LocalMetricsOnly && !c.local {
		return refuse(ErrMissing, "no such path")
	}
	c.s.metrics.handler.ServeHTTP(c.w, c.r)
	return nil
}
