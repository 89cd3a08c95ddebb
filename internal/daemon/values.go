package daemon

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// value is one setting's way from text and back. Parse leaves the setting as it
// was when the text is wrong, and says what it should have been.
type value interface {
	Parse(text string) error
	String() string // what Parse accepts
	Kind() string   // for help: "size", "duration", ...
}

type textValue struct{ p *string }

func (v textValue) Parse(s string) error { *v.p = s; return nil }
func (v textValue) String() string       { return *v.p }
func (v textValue) Kind() string         { return "text" }

// choiceValue is one of a few words.
type choiceValue struct {
	p     *string
	words []string
}

func (v choiceValue) Parse(s string) error {
	for _, w := range v.words {
		if s == w {
			*v.p = s
			return nil
		}
	}
	return fmt.Errorf("%q is not one of %s", s, strings.Join(v.words, ", "))
}
func (v choiceValue) String() string { return *v.p }
func (v choiceValue) Kind() string   { return strings.Join(v.words, "|") }

type boolValue struct{ p *bool }

func (v boolValue) Parse(s string) error {
	b, err := strconv.ParseBool(s)
	if err != nil {
		return fmt.Errorf("%q is not true or false", s)
	}
	*v.p = b
	return nil
}
func (v boolValue) String() string { return strconv.FormatBool(*v.p) }
func (v boolValue) Kind() string   { return "bool" }

type intValue struct{ p *int }

func (v intValue) Parse(s string) error {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return fmt.Errorf("%q is not a whole number of at least 0", s)
	}
	*v.p = n
	return nil
}
func (v intValue) String() string { return strconv.Itoa(*v.p) }
func (v intValue) Kind() string   { return "number" }

type floatValue struct{ p *float64 }

func (v floatValue) Parse(s string) error {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || f < 0 || math.IsNaN(f) || math.IsInf(f, 0) {
		return fmt.Errorf("%q is not a number of at least 0", s)
	}
	*v.p = f
	return nil
}
func (v floatValue) String() string { return strconv.FormatFloat(*v.p, 'g', -1, 64) }
func (v floatValue) Kind() string   { return "number" }

type durationValue struct{ p *time.Duration }

func (v durationValue) Parse(s string) error {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return fmt.Errorf("%q is not a duration such as 30s, 5m or 1h30m", s)
	}
	*v.p = d
	return nil
}
func (v durationValue) String() string { return v.p.String() }
func (v durationValue) Kind() string   { return "duration" }

// sizeValue is a number of bytes.
type sizeValue struct{ p *int64 }

var sizeUnits = []struct {
	suffix string
	bytes  int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1}, {"", 1},
}

// ParseSize reads a number of bytes: "512MiB", "20GiB", "1TB" or plain bytes.
func ParseSize(s string) (int64, error) {
	for _, u := range sizeUnits {
		digits, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
		if err != nil || n < 0 || n > math.MaxInt64/u.bytes {
			break
		}
		return n * u.bytes, nil
	}
	return 0, fmt.Errorf("%q is not a size such as 512MiB, 20GiB or a number of bytes", s)
}

// FormatSize writes a number of bytes so that ParseSize reads the same number.
func FormatSize(n int64) string {
	for i := 3; i >= 0; i-- {
		if u := sizeUnits[i]; n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10)
}

func (v sizeValue) Parse(s string) error {
	n, err := ParseSize(s)
	if err == nil {
		*v.p = n
	}
	return err
}
func (v sizeValue) String() string { return FormatSize(*v.p) }
func (v sizeValue) Kind() string   { return "size" }

// listValue is words separated by commas; a TOML array arrives as such.
type listValue struct{ p *[]string }

func (v listValue) Parse(s string) error {
	list := []string{}
	for word := range strings.SplitSeq(s, ",") {
		if word = strings.TrimSpace(word); word != "" {
			list = append(list, word)
		}
	}
	*v.p = list
	return nil
}
func (v listValue) String() string { return strings.Join(*v.p, ",") }
func (v listValue) Kind() string   { return "list" }
