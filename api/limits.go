package api

import (
	"math"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits bound what one client can take. Zero fields get the default.
type Limits struct {
	Body         int64         // bytes of a JSON body; 1 MiB
	Header       int           // bytes of a request's header; 64 KiB
	ReadHeader   time.Duration // 10 s
	Idle         time.Duration // of a kept-alive connection; 120 s
	Request      time.Duration // of a request, transfers apart; 60 s
	TransferIdle time.Duration // longest pause inside an upload or a download; 60 s
	Import       time.Duration // of an import, fetching and building; 15 min
	Uploads      int           // at once, and as many images that are published; 4
	UploadWait   time.Duration // for a free place among them; 10 s
	KeyRate      float64       // requests per second and key; 0: no limit
	KeyBurst     int           // at once; 2 × KeyRate
	FailureRate  float64       // failed authentications per second and address; 1; negative: no limit
	FailureBurst int           // at once; 20
}

func (l Limits) withDefaults() Limits {
	or(&l.Body, 1<<20)
	or(&l.Header, 64<<10)
	or(&l.ReadHeader, 10*time.Second)
	or(&l.Idle, 120*time.Second)
	or(&l.Request, 60*time.Second)
	or(&l.TransferIdle, 60*time.Second)
	or(&l.Import, 15*time.Minute)
	or(&l.Uploads, 4)
	or(&l.UploadWait, 10*time.Second)
	or(&l.KeyBurst, int(math.Ceil(2*l.KeyRate)))
	or(&l.FailureRate, 1)
	or(&l.FailureBurst, 20)
	return l
}

func or[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// HTTPServer gives a server for h. It sets no ReadTimeout or WriteTimeout, which
// would cut long uploads: the handlers set deadlines per request.
func HTTPServer(h http.Handler, l Limits) *http.Server {
	l = l.withDefaults()
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: l.ReadHeader,
		IdleTimeout:       l.Idle,
		MaxHeaderBytes:    l.Header,
	}
}

// limiters are token buckets by name. Full buckets are forgotten: they say nothing.
type limiters struct {
	rate  rate.Limit
	burst int
	now   func() time.Time

	mu     sync.Mutex
	byName map[string]*rate.Limiter
	sweep  int // names at which to look for full buckets
}

const firstSweep = 1024

// newLimiters gives nil, which allows everything, for a rate that is not positive.
func newLimiters(perSecond float64, burst int, now func() time.Time) *limiters {
	if perSecond <= 0 {
		return nil
	}
	return &limiters{rate: rate.Limit(perSecond), burst: max(burst, 1), now: now,
		byName: map[string]*rate.Limiter{}, sweep: firstSweep}
}

// take takes a token; when there is none it tells how many seconds to wait.
func (l *limiters) take(name string) (ok bool, after int) {
	if l == nil {
		return true, 0
	}
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	b, found := l.byName[name]
	if !found {
		if len(l.byName) >= l.sweep {
			l.forgetFull(now)
		}
		b = rate.NewLimiter(l.rate, l.burst)
		l.byName[name] = b
	}
	if b.AllowN(now, 1) {
		return true, 0
	}
	wait := (1 - b.TokensAt(now)) / float64(l.rate)
	return false, max(1, int(math.Ceil(wait)))
}

func (l *limiters) forgetFull(now time.Time) {
	for name, b := range l.byName {
		if b.TokensAt(now) >= float64(l.burst) {
			delete(l.byName, name)
		}
	}
	l.sweep = max(firstSweep, 2*len(l.byName))
}

// address is the client's, for limits: of IPv6 the /64, which one client has whole.
func address(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	ip, err := netip.ParseAddr(host)
	if err != nil || ip.Unmap().Is4() {
		return host
	}
	p, err := ip.WithZone("").Prefix(64)
	if err != nil {
		return host
	}
	return p.String()
}
