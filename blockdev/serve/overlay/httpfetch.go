package overlay

import (
	"context"
	"fmt"
	"io"
	"net/http"
)

// HTTPFetch fetches by range requests (RFC 9110, section 14), as object stores
// answer them. url is the operator's, never a tenant's. What does not answer a
// range with exactly that range is refused, whatever it sends. No error has the
// address in it.
func HTTPFetch(client *http.Client, url string) Fetch {
	return HTTPFetchFrom(client, func() string { return url })
}

// HTTPFetchFrom is HTTPFetch from an address that may change: it is asked for each range.
func HTTPFetchFrom(client *http.Client, address func() string) Fetch {
	return func(ctx context.Context, p []byte, off int64) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, address(), nil)
		if err != nil {
			return bare(err)
		}
		end := off + int64(len(p)) - 1
		request.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, end))
		request.Header.Set("Accept-Encoding", "identity")
		response, err := client.Do(request)
		if err != nil {
			return bare(err)
		}
		defer response.Body.Close()
		var from, to int64
		switch _, err := fmt.Sscanf(response.Header.Get("Content-Range"), "bytes %d-%d/", &from, &to); {
		case response.StatusCode != http.StatusPartialContent:
			return fmt.Errorf("%w: status %d for a range", errStore, response.StatusCode)
		case err != nil || from != off || to != end:
			return fmt.Errorf("%w: bytes %d to %d were asked for, it says %.60q", errStore, off, end, response.Header.Get("Content-Range"))
		}
		if _, err := io.ReadFull(response.Body, p); err != nil {
			return fmt.Errorf("%w: it ends early: %w", errStore, err)
		}
		return nil
	}
}
