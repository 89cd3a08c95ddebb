package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/api"
)

// Serve runs the daemon until ctx ends: it starts, listens, and drains. out
// gets what --dev tells its user, errOut the log.
func Serve(ctx context.Context, c Config, out, errOut io.Writer) (err error) {
	log, err := newLog(c, errOut)
	if err != nil {
		return Usage(err)
	}
	n, err := claim(c, log, "serve")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	if err := tryListen(ctx, c); err != nil {
		n.orderly = n.clean // nothing has begun
		return err
	}
	if err := n.open(ctx); err != nil {
		return err
	}
	if err := n.engine.Reconcile(ctx); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	if n.boxes != nil {
		if err := n.boxes.Reconcile(ctx); err != nil {
			return fmt.Errorf("start: %w", err)
		}
	}
	s, err := n.server(ctx)
	if err != nil {
		return err
	}
	err = s.run(ctx, out)
	n.orderly = err == nil
	return err
}

// server is a node that is being served.
type server struct {
	n     *node
	api   *api.Server
	at    listeners
	https []*http.Server
	wg    sync.WaitGroup
	ended chan error // of a part that ended before it was told to
}

func (n *node) server(ctx context.Context) (*server, error) {
	registry := prometheus.NewRegistry()
	if err := n.collect(registry); err != nil {
		return nil, err
	}
	s := &server{n: n, ended: make(chan error, 8)}
	limits := api.Limits{
		ReadHeader: n.c.HeaderLimit, Idle: n.c.IdleLimit, Request: n.c.RequestLimit, TransferIdle: n.c.TransferLimit, Import: n.c.ImportLimit,
		Uploads: n.c.MaxUploads, KeyRate: n.c.RateLimit, KeyBurst: n.c.RateBurst,
	}
	var err error
	var boxes api.Sandboxes
	if n.boxes != nil {
		boxes = n.boxes
	}
	s.api, err = api.New(api.Options{
		Engine: n.engine, Sandboxes: boxes, Library: n.library, Auth: n.auth, Audit: n.audit, Metrics: registry,
		Log: n.log, Secret: n.secret, Limits: limits, PublicURL: n.c.PublicURL,
		Ready: n.healthy, Doctor: n.checksBody, TenantsAttach: n.c.TenantsAttach, Version: n.c.Version,
	})
	if err != nil {
		return nil, err
	}
	if s.at, err = listen(ctx, n.c); err != nil {
		return nil, err
	}
	for _, l := range []struct {
		on net.Listener
		h  http.Handler
	}{{s.at.tcp, s.api.Handler()}, {s.at.unix, s.api.LocalHandler()}} {
		if l.on != nil {
			s.serve(l.on, api.HTTPServer(l.h, limits))
		}
	}
	return s, nil
}

func (s *server) serve(l net.Listener, h *http.Server) {
	h.ErrorLog = slog.NewLogLogger(s.n.log.Handler(), slog.LevelWarn)
	s.https = append(s.https, h)
	s.start("server", func() error {
		if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
}

// start runs a part until it ends; an error ends the daemon.
func (s *server) start(what string, part func() error) {
	s.wg.Go(func() {
		if err := part(); err != nil {
			s.ended <- fmt.Errorf("%s: %w", what, err)
		}
	})
}

// run serves until ctx ends or a part fails, then stops in order.
func (s *server) run(ctx context.Context, out io.Writer) error {
	working, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	s.start("engine", func() error { return s.n.engine.Run(working) })
	s.start("templates", func() error { s.n.library.Run(working); return nil })
	s.start("trims", func() error { return s.n.engine.Trims(working, s.n.c.TrimInterval) })
	if s.n.boxes != nil {
		s.start("sandboxes", func() error { return s.n.boxes.Run(working) })
	}
	s.start("backups", func() error { return s.n.backups(working) })
	s.start("space", func() error { s.n.space.watch(working); return nil })
	for _, p := range s.n.others {
		s.start("health of "+p.name, func() error { return s.n.watchHealth(working, p) })
		if p.backend != nil {
			s.start("space of "+p.name, func() error { p.space.watch(working); return nil })
		}
	}
	s.start("watchdog", func() error {
		watchdog(working, watchdogInterval(), s.n.healthy, func(err error) { s.n.log.Error("no sign of life for the watchdog", "cause", err) })
		return nil
	})
	err := s.announce(ctx, out)
	if err == nil {
		select {
		case <-ctx.Done():
			s.n.log.Info("stopping: no new work is taken", "deadline", s.n.c.DrainLimit)
		case err = <-s.ended:
			s.n.log.Error("stopping: a part failed", "cause", err)
		}
	}
	_ = notify("STOPPING=1") // systemd sees the end of the process as well
	drained := s.drain(context.WithoutCancel(ctx))
	stop()
	s.wg.Wait()
	if err == nil && drained == nil {
		s.n.log.Info("stopped; devices, mounts and sandboxes stay as they are")
	}
	return errors.Join(err, drained)
}

// announce tells everybody that the API is there.
func (s *server) announce(ctx context.Context, out io.Writer) error {
	url := s.at.url(s.n.c)
	if err := s.n.lock.Listening(url); err != nil {
		return err
	}
	var key string
	if s.n.c.Dev {
		var err error
		if key, err = s.n.devKey(ctx); err != nil {
			return fmt.Errorf("development key: %w", err)
		}
	}
	if s.at.tcp != nil {
		if err := writeFile(s.n.at.listen(), []byte(s.at.tcp.Addr().String()+"\n")); err != nil {
			return err
		}
	}
	s.n.log.Info("ready", "url", url, "socket", s.n.c.Socket, "pool", s.n.poolDir, "version", s.n.c.Version)
	if err := notify("READY=1"); err != nil {
		s.n.log.Warn("systemd was not told that the daemon is ready", "cause", err)
	}
	if s.n.c.Dev {
		return s.n.printDev(out, url, key)
	}
	return nil
}

// drain lets requests under way end, up to the deadline.
func (s *server) drain(ctx context.Context) error {
	s.api.Drain()
	ctx, cancel := context.WithTimeout(ctx, s.n.c.DrainLimit)
	defer cancel()
	var wg sync.WaitGroup
	for _, h := range s.https {
		wg.Go(func() {
			if err := h.Shutdown(ctx); err != nil {
				s.n.log.Warn("requests were cut off at the deadline", "cause", err)
				_ = h.Close()
			}
		})
	}
	wg.Wait()
	return s.at.close()
}
