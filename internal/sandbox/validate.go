package sandbox

import (
	"errors"
	"regexp"
	"strings"
	"unicode/utf8"

	"holdfast/api"
	"holdfast/engine"
)

var (
	externalIDForm = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)
	regionForm     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	imageForm      = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}$`)
)

// checkRecord holds what users write into a sandbox against the rules that
// volumes have.
func checkRecord(rec record) error {
	invalid := func(field, format string, args ...any) error {
		return problem(engine.ErrInvalid, field, format, args...)
	}
	switch {
	case !utf8.ValidString(rec.DisplayName) || utf8.RuneCountInString(rec.DisplayName) > 63:
		return invalid("metadata.displayName", "must be at most 63 characters of UTF-8")
	case rec.ExternalID != "" && !externalIDForm.MatchString(rec.ExternalID):
		return invalid("metadata.externalId", "must be at most 64 letters, digits and hyphens")
	case rec.Region != "" && !regionForm.MatchString(rec.Region):
		return invalid("spec.region", "must be 1 to 63 letters, digits, dots, underscores and hyphens")
	case !imageForm.MatchString(rec.Image):
		return invalid("spec.runtime.image", "must be a name like blaxel/base-image:latest")
	case rec.MemoryMiB < minMemory:
		return invalid("spec.runtime.memory", "must be at least %d MB", minMemory)
	case len(rec.Ports) > 100:
		return invalid("spec.runtime.ports", "must be at most 100")
	case len(rec.Labels) > 64:
		return invalid("metadata.labels", "must be at most 64 labels")
	}
	for k, v := range rec.Labels {
		if k == "" || len(k) > 63 || len(v) > 255 || !utf8.ValidString(k) || !utf8.ValidString(v) || strings.ContainsAny(k, "=\x00") || strings.Contains(v, "\x00") {
			return invalid("metadata.labels", "key %.70q: keys are 1 to 63 bytes of UTF-8 without '=', values at most 255", k)
		}
	}
	for _, p := range rec.Ports {
		if p.Target < 1 || p.Target > 65535 || len(p.Name) > 63 || len(p.Protocol) > 16 {
			return invalid("spec.runtime.ports", "target must be from 1 to 65535, name at most 63 bytes")
		}
	}
	return nil
}

func checkEnvs(envs []api.EnvVar) error {
	if len(envs) > maxEnvs {
		return problem(engine.ErrInvalid, "spec.runtime.envs", "must be at most %d", maxEnvs)
	}
	var errs []error
	for _, e := range envs {
		errs = append(errs, checkVariable("spec.runtime.envs", e.Name, e.Value))
	}
	return errors.Join(errs...)
}

func checkVariable(field, name, value string) error {
	if !variableForm.MatchString(name) || len(name) > 255 {
		return problem(engine.ErrInvalid, field, "%.70q is not a variable's name", name)
	}
	if len(value) > maxText || strings.Contains(value, "\x00") {
		return problem(engine.ErrInvalid, field, "the value of %.70q must be at most %d bytes, without NUL", name, maxText)
	}
	return nil
}

func checkExec(e api.Exec) error {
	switch {
	case len(e.Command) > maxCommand || strings.Contains(e.Command, "\x00"):
		return problem(engine.ErrInvalid, "command", "must be at most %d bytes, without NUL", maxCommand)
	case len(e.Dir) > 4095 || strings.Contains(e.Dir, "\x00"):
		return problem(engine.ErrInvalid, "workingDir", "must be at most 4095 bytes, without NUL")
	case e.Name != "" && !processNameForm.MatchString(e.Name):
		return problem(engine.ErrInvalid, "name", "must be 1 to 128 letters, digits, dots, underscores and hyphens")
	case len(e.Env) > maxEnvs:
		return problem(engine.ErrInvalid, "env", "must be at most %d", maxEnvs)
	}
	for name, value := range e.Env {
		if err := checkVariable("env", name, value); err != nil {
			return err
		}
	}
	return nil
}
