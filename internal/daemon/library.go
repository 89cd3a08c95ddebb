package daemon

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/api"
	"holdfast/internal/bytesize"
	"holdfast/internal/preflight"
	"holdfast/templates"
)

var (
	templateCount    = desc("templates", "Templates.")
	templateVersions = desc("template_versions", "Versions of templates with an image, by state.", "state")
	templateBytes    = desc("template_bytes", "Bytes of images, by kind.", "kind")
	templateSources  = desc("template_sources", "Cached images that volumes are cloned from.")
	templateSuspect  = desc("template_versions_unverified", "Versions to be verified before their next use, after an unclean stop.")
	scrubbedImages   = desc("template_scrubbed_images_total", "Images that the scrub verified, since the start.")
	scrubbedBytes    = desc("template_verified_bytes_total", "Bytes read to verify images, since the start.")
)

var libraryDescs = []*prometheus.Desc{
	templateCount, templateVersions, templateBytes, templateSources, templateSuspect, scrubbedImages, scrubbedBytes,
}

func (c *nodeCollector) library(_ context.Context, out emit) error {
	s := c.n.library.Stats()
	out(templateCount, prometheus.GaugeValue, float64(s.Templates))
	out(templateVersions, prometheus.GaugeValue, float64(s.Revisions), "ready")
	out(templateVersions, prometheus.GaugeValue, float64(s.Damaged), "damaged")
	out(templateBytes, prometheus.GaugeValue, float64(s.RevisionBytes), "version")
	out(templateBytes, prometheus.GaugeValue, float64(s.SourceBytes), "source")
	out(templateSources, prometheus.GaugeValue, float64(s.Sources))
	out(templateSuspect, prometheus.GaugeValue, float64(s.Suspect))
	out(scrubbedImages, prometheus.CounterValue, float64(s.Scrubbed))
	out(scrubbedBytes, prometheus.CounterValue, float64(s.ScrubbedBytes))
	return nil
}

// templateEvent counts and audits what the library did or found by itself.
func (n *node) templateEvent(h templates.Happening) {
	n.meters.templates.WithLabelValues(string(h.Type)).Inc()
	e := api.Entry{
		Time: h.Time, Workspace: h.Workspace, Principal: "holdfastd", Action: "template.version." + string(h.Type),
		Resource: h.Template + ":" + h.Version, Remote: "local", Status: 200, Error: h.Message,
	}
	if err := n.audit.Record(context.Background(), e); err != nil {
		n.log.Error("audit entry not written", "action", e.Action, "cause", err)
	}
}

// checkTemplates is the doctor's line about template images.
func (n *node) checkTemplates() preflight.Check {
	s := n.library.Stats()
	check := preflight.Check{
		Name: "template images", Status: preflight.OK,
		Found: fmt.Sprintf("%d, of %s verified since the start", s.Revisions, bytesize.Human(s.ScrubbedBytes)),
	}
	if s.Suspect > 0 {
		check.Found += fmt.Sprintf("; %d are verified before their next use, because the daemon did not stop in order", s.Suspect)
	}
	if s.Damaged > 0 {
		check.Status = preflight.Warn
		check.Found = fmt.Sprintf("%d damaged: %s", s.Damaged, n.library.DamagedNames(10))
		check.Consequence = "no volume is made from these; volumes that were made from them before may be damaged as well (holdfast template history)"
		check.Fix = "look for errors of the disk in the kernel's log; then roll back or push again, and delete the damaged version"
	}
	return check
}

// minScrubInterval keeps a mistake from reading all images without end.
const minScrubInterval = time.Minute
