package daemon

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/bytesize"
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

func (v sizeValue) Parse(s string) error {
	n, err := bytesize.Parse(s, 1)
	if err == nil {
		*v.p = n
	}
	return err
}
func (v sizeValue) String() string { return bytesize.Format(*v.p) }
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
