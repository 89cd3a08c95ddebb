package bench

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"math"
)

// chart shows ratios as bars, with their intervals and goals, in an SVG that is
// readable on light and on dark ground.
type chart struct {
	title    string
	sections []chartSection
}

type chartSection struct {
	title string
	bars  []chartBar
}

// chartBar is one ratio; goal 0: there is none.
type chartBar struct {
	label                  string
	ratio, low, high, goal float64
	met                    bool
}

// Sizes in the picture's own units.
const (
	chartWidth  = 760
	chartLeft   = 170 // where the bars begin
	chartRight  = 590 // where the largest ratio ends
	chartLine   = 22
	chartBarTop = 5
	chartBarHas = 12
)

const chartStyle = `
text{font:12px system-ui,sans-serif;fill:#24292f}
.title{font-size:15px;font-weight:600}
.section{font-weight:600}
.axis{stroke:#d0d7de;stroke-width:1}
.one{stroke:#57606a;stroke-width:1;stroke-dasharray:3 3}
.bar{fill:#54aeff}
.span{stroke:#0a3069;stroke-width:1.5}
.goal{stroke:#bc4c00;stroke-width:2.5}
.small{font-size:11px;fill:#57606a}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}.axis{stroke:#30363d}.one{stroke:#8b949e}.bar{fill:#1f6feb}.span{stroke:#c9e3ff}.goal{stroke:#f0883e}.small{fill:#8b949e}
}`

// most is the largest ratio that the chart has room for, a half or more.
func (c chart) most() float64 {
	most := 1.0
	for _, s := range c.sections {
		for _, b := range s.bars {
			most = max(most, b.ratio, b.goal)
		}
	}
	return min(math.Ceil(most*4)/4+0.25, 4)
}

func (c chart) height() int {
	lines := 3 // title, axis, legend
	for _, s := range c.sections {
		lines += 1 + len(s.bars)
	}
	return lines*chartLine + 16
}

// svg draws it.
func (c chart) svg() []byte {
	var b bytes.Buffer
	most, bottom := c.most(), c.height()-2*chartLine
	x := func(ratio float64) float64 {
		return chartLeft + min(ratio, most)/most*(chartRight-chartLeft)
	}
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img"><title>%s</title><style>%s</style>`+"\n", chartWidth, c.height(), escaped(c.title), escaped(chartStyle))
	fmt.Fprintf(&b, `<text class="title" x="8" y="20">%s</text>`+"\n", escaped(c.title))
	for at := 0.0; at <= most; at += 0.5 {
		fmt.Fprintf(&b, `<line class="axis" x1="%.1f" y1="28" x2="%.1f" y2="%d"/><text class="small" text-anchor="middle" x="%.1f" y="%d">%.1f</text>`+"\n", x(at), x(at), bottom, x(at), bottom+14, at)
	}
	fmt.Fprintf(&b, `<line class="one" x1="%.1f" y1="28" x2="%.1f" y2="%d"/>`+"\n", x(1), x(1), bottom)
	y := chartLine + 8
	for _, s := range c.sections {
		fmt.Fprintf(&b, `<text class="section" x="8" y="%d">%s</text>`+"\n", y+15, escaped(s.title))
		y += chartLine
		for _, bar := range s.bars {
			bar.draw(&b, x, y)
			y += chartLine
		}
	}
	fmt.Fprintf(&b, `<text class="small" x="8" y="%d">Bar: median of the rounds' ratios. Thin line: its 95 %% interval. Upright line: the goal. More is better.</text>`+"\n</svg>\n", c.height()-8)
	return b.Bytes()
}

func (bar chartBar) draw(b *bytes.Buffer, x func(float64) float64, y int) {
	top, middle := y+chartBarTop, y+chartBarTop+chartBarHas/2
	fmt.Fprintf(b, `<text x="16" y="%d">%s</text><rect class="bar" x="%d" y="%d" width="%.1f" height="%d"/>`,
		y+15, escaped(bar.label), chartLeft, top, x(bar.ratio)-chartLeft, chartBarHas)
	if bar.high > 0 {
		fmt.Fprintf(b, `<line class="span" x1="%.1f" y1="%d" x2="%.1f" y2="%d"/>`, x(bar.low), middle, x(bar.high), middle)
	}
	said := fmt.Sprintf("%.2f", bar.ratio)
	if bar.high > 0 {
		said += fmt.Sprintf(" (%.2f to %.2f)", bar.low, bar.high)
	}
	if bar.goal > 0 {
		fmt.Fprintf(b, `<line class="goal" x1="%.1f" y1="%d" x2="%.1f" y2="%d"/>`, x(bar.goal), top-3, x(bar.goal), top+chartBarHas+3)
		said += map[bool]string{true: ", met", false: ", missed"}[bar.met]
	}
	fmt.Fprintf(b, `<text class="small" x="%d" y="%d">%s</text>`+"\n", chartRight+8, y+15, escaped(said))
}

func escaped(s string) string {
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(s)) // a buffer takes everything
	return b.String()
}
