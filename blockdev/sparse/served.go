package sparse

import (
	"context"
	"errors"
	"time"
)

func (p *Pool) sealServed(_ context.Context, _ subject, _ string, _ func() error) (time.Duration, error) {
	return 0, errors.ErrUnsupported
}
