package client

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// ControlConfig says whose workers to control.
type ControlConfig struct {
	// Dataset is the name that errors use: namespace/name.
	Dataset string
	// Membership, or MembershipFile, which is read at every call, says who they are.
	Membership     ring.Membership
	MembershipFile string
	// Keys are the dataset's; Control is used.
	Keys wire.Keys
	// Timeout bounds one request to one worker; zero means 10 s.
	Timeout time.Duration
	// Dialer connects to workers; nil means a net.Dialer.
	Dialer func(ctx context.Context, network, addr string) (net.Conn, error)
	// Now is the clock that signs requests and measures Wait; nil means time.Now.
	Now func() time.Time
}

// Workers' answers are not authenticated, and the controller, which asks those of all Datasets, has little memory.
const (
	// maxAnswer bounds one worker's answer; a load's has as many failed files as fit.
	maxAnswer = wire.MaxControl
	// maxHeader bounds the header of each.
	maxHeader = 16 << 10
	// maxSaid bounds what is kept of a refusal.
	maxSaid = 1 << 10
	// maxReads is how many answers of a dataset's workers are read at a time.
	maxReads = 16
)

// Control asks all workers of a dataset at their HTTP endpoints, in parallel.
//
// Where some workers answer and others do not, its methods return what was learned together with an
// error that names those that did not (a Missing, found with errors.As).
type Control struct {
	config ControlConfig
	http   *http.Client
	read   chan struct{} // held while an answer is read
}

// Missing is the error for workers that could not be asked, or refused.
type Missing struct {
	Dataset string
	Asked   int
	Errors  map[string]error // by member id
}

// Error names every worker and its reason.
func (m *Missing) Error() string {
	ids := make([]string, 0, len(m.Errors))
	for id := range m.Errors {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	refused := 0
	for i, id := range ids {
		if errors.Is(m.Errors[id], errRefused) || errors.Is(m.Errors[id], ErrNoLoad) {
			refused++
		}
		ids[i] = fmt.Sprintf("worker %s: %v", id, m.Errors[id])
	}
	what := "did not answer"
	switch refused {
	case 0:
	case len(ids):
		what = "refused"
	default:
		what += " or refused"
	}
	return fmt.Sprintf("dataset %s: %d of %d workers %s: %s", m.Dataset, len(m.Errors), m.Asked, what, strings.Join(ids, "; "))
}

// Unwrap lets errors.Is see the reasons.
func (m *Missing) Unwrap() []error {
	var errs []error
	for _, err := range m.Errors {
		errs = append(errs, err)
	}
	return errs
}

// ErrNoLoad: no worker knows the load: it was never started, was deleted, or the worker restarted.
var ErrNoLoad = errors.New("no such load")

// NewControl returns a Control. Close ends its idle connections.
func NewControl(config ControlConfig) (*Control, error) {
	if config.Timeout == 0 {
		config.Timeout = 10 * time.Second
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.Dialer == nil {
		config.Dialer = (&net.Dialer{Timeout: wire.DialTimeout}).DialContext
	}
	if config.MembershipFile == "" {
		if err := config.Membership.Validate(); err != nil {
			return nil, fmt.Errorf("dataset %s: %w", config.Dataset, err)
		}
	}
	return &Control{config: config, read: make(chan struct{}, maxReads), http: &http.Client{
		Transport:     &http.Transport{DialContext: config.Dialer, MaxIdleConnsPerHost: 2, IdleConnTimeout: 30 * time.Second, MaxResponseHeaderBytes: maxHeader},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Close ends idle connections.
func (k *Control) Close() { k.http.CloseIdleConnections() }

func (k *Control) members() ([]ring.Member, ring.Membership, error) {
	m := k.config.Membership
	if k.config.MembershipFile != "" {
		var err error
		if m, err = ring.Load(k.config.MembershipFile); err != nil {
			return nil, m, fmt.Errorf("dataset %s: %w", k.config.Dataset, err)
		}
	}
	if len(m.Members) == 0 {
		return nil, m, fmt.Errorf("dataset %s: there are no workers", k.config.Dataset)
	}
	return m.Members, m, nil
}

// do makes one signed request and decodes its JSON answer into out, which may be nil.
func (k *Control) do(ctx context.Context, m ring.Member, method, path string, query url.Values, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, k.config.Timeout)
	defer cancel()
	if m.Control == "" {
		return errors.New("its control address is not known")
	}
	err := fmt.Errorf("%w: no control key; give the Dataset's", wire.ErrUnauthorized)
	for _, key := range k.config.Keys.Control { // during a rotation a worker may know only the older one
		err = k.once(ctx, m, key, method, path, query, in, out)
		if !errors.Is(err, wire.ErrUnauthorized) {
			return err
		}
	}
	return err
}

func (k *Control) once(ctx context.Context, m ring.Member, key wire.Key, method, path string, query url.Values, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	u := url.URL{Scheme: "http", Host: m.Control, Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if err := wire.SignRequest(req, key, m.ID, k.config.Now()); err != nil {
		return err
	}
	resp, err := k.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	select {
	case k.read <- struct{}{}:
		defer func() { <-k.read }()
	case <-ctx.Done():
		return fmt.Errorf("%s %s: %w", method, path, ctx.Err())
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("%s %s: %w", method, path, err)
	case len(b) > maxAnswer:
		return fmt.Errorf("%s %s: the answer is longer than %d bytes", method, path, maxAnswer)
	case resp.StatusCode/100 != 2:
		return statusError(method, path, resp.StatusCode, b)
	case out != nil:
		if err := json.Unmarshal(b, out); err != nil {
			return fmt.Errorf("%s %s: the answer is not the JSON expected: %w", method, path, err)
		}
	}
	return nil
}

func statusError(method, path string, code int, body []byte) error {
	text := string(body)
	var said struct {
		Error string `json:"error"`
	}
	if json.Unmarshal(body, &said) == nil && said.Error != "" {
		text = said.Error
	}
	text = strings.ToValidUTF8(strings.TrimSpace(strings.Clone(text[:min(len(text), maxSaid)])), "")
	var kind error
	switch code {
	case http.StatusUnauthorized, http.StatusForbidden:
		kind = wire.ErrUnauthorized
	case http.StatusNotFound:
		kind = errNotFound
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		kind = wire.ErrOverloaded
	default:
		kind = errRefused
	}
	err := fmt.Errorf("%s %s: %w: status %d: %s", method, path, kind, code, text)
	if kind != errRefused {
		err = answered{err}
	}
	return err
}

var (
	errNotFound = errors.New("not found")
	errRefused  = errors.New("refused")
)

// answered is an error that a worker gave: it is errRefused besides what it says.
type answered struct{ error }

func (e answered) Unwrap() error        { return e.error }
func (e answered) Is(target error) bool { return target == errRefused }

// each calls f for every member in parallel and collects the failures.
func (k *Control) each(ctx context.Context, f func(ctx context.Context, n int, m ring.Member) error) error {
	members, _, err := k.members()
	if err != nil {
		return err
	}
	return k.over(ctx, members, f)
}

func (k *Control) over(ctx context.Context, members []ring.Member, f func(ctx context.Context, n int, m ring.Member) error) error {
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		miss = Missing{Dataset: k.config.Dataset, Asked: len(members), Errors: make(map[string]error)}
	)
	for n, m := range members {
		wg.Go(func() {
			if err := f(ctx, n, m); err != nil {
				mu.Lock()
				miss.Errors[m.ID] = err
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(miss.Errors) > 0 {
		return &miss
	}
	return nil
}

// Status asks every worker for its own. Those that did not answer are left out, and named in the error.
func (k *Control) Status(ctx context.Context) ([]wire.WorkerStatus, error) {
	members, _, err := k.members()
	if err != nil {
		return nil, err
	}
	all := make([]*wire.WorkerStatus, len(members))
	err = k.over(ctx, members, func(ctx context.Context, n int, m ring.Member) error {
		var s wire.WorkerStatus
		if err := k.do(ctx, m, http.MethodGet, wire.PathStatus, nil, nil, &s); err != nil {
			return err
		}
		all[n] = &s
		return nil
	})
	return present(all), err
}

func present[T any](all []*T) []T {
	var out []T
	for _, v := range all {
		if v != nil {
			out = append(out, *v)
		}
	}
	return out
}

// Tell gives every worker the membership that this Control was made with, for those that follow an older
// one: the kubelet brings a changed file to a pod only after a minute or so.
func (k *Control) Tell(ctx context.Context) error {
	_, list, err := k.members()
	if err != nil {
		return err
	}
	return k.each(ctx, func(ctx context.Context, _ int, m ring.Member) error {
		return k.do(ctx, m, http.MethodPost, wire.PathMembers, nil, list, nil)
	})
}

// Load starts a load on every worker. It is idempotent: a worker that has a load of that id already keeps
// it. An error means that some did not start it; call again.
func (k *Control) Load(ctx context.Context, r wire.LoadRequest) error {
	if r.ID == "" || strings.ContainsAny(r.ID, "/?#") {
		return fmt.Errorf("dataset %s: load id %q: want a name without / ? #", k.config.Dataset, r.ID)
	}
	return k.each(ctx, func(ctx context.Context, _ int, m ring.Member) error {
		return k.do(ctx, m, http.MethodPost, wire.PathLoads, nil, r, nil)
	})
}

// LoadSum is a load over all workers.
type LoadSum struct {
	// LoadStatus sums the workers' parts. Done is set only when every member was asked and is done.
	wire.LoadStatus
	// Workers are the parts by member id.
	Workers map[string]wire.LoadStatus
	// Missing are the members that did not answer, or do not know the load, and why.
	Missing map[string]error
}

// LoadStatus asks every worker for its part of a load. The error is ErrNoLoad when nobody knows it, and
// otherwise only that nobody answered: single workers that did not are in the sum's Missing.
func (k *Control) LoadStatus(ctx context.Context, id string) (LoadSum, error) {
	members, _, err := k.members()
	if err != nil {
		return LoadSum{}, err
	}
	parts := make([]*wire.LoadStatus, len(members))
	err = k.over(ctx, members, func(ctx context.Context, n int, m ring.Member) error {
		var s wire.LoadStatus
		err := k.do(ctx, m, http.MethodGet, wire.PathLoads+"/"+url.PathEscape(id), nil, nil, &s)
		if errors.Is(err, errNotFound) {
			return fmt.Errorf("load %s: %w", id, ErrNoLoad)
		}
		if err == nil {
			parts[n] = &s
		}
		return err
	})
	sum := LoadSum{Workers: make(map[string]wire.LoadStatus), Missing: make(map[string]error)}
	sum.ID, sum.Done = id, true
	var miss *Missing
	if errors.As(err, &miss) {
		sum.Missing, sum.Done = miss.Errors, false
	}
	for n, p := range parts {
		if p != nil {
			sum.Workers[members[n].ID] = *p
			sum.add(members[n].ID, *p)
		}
	}
	if len(sum.Workers) > 0 {
		return sum, nil
	}
	sum.Done = false
	for _, e := range sum.Missing {
		if !errors.Is(e, ErrNoLoad) {
			return sum, err
		}
	}
	return sum, fmt.Errorf("dataset %s: load %s: %w", k.config.Dataset, id, ErrNoLoad)
}

// add takes in one worker's part.
func (s *LoadSum) add(id string, p wire.LoadStatus) {
	if s.Snapshot == "" {
		s.Snapshot = p.Snapshot
	}
	if s.Started.IsZero() || p.Started.Before(s.Started) {
		s.Started = p.Started
	}
	if p.Finished.After(s.Finished) {
		s.Finished = p.Finished
	}
	s.Files += p.Files
	s.Total += p.Total
	s.Resident += p.Resident
	s.Fetched += p.Fetched
	s.FailedFiles += p.FailedFiles
	s.Lost = s.Lost || p.Lost
	s.Failures = append(s.Failures, p.Failures...)
	if p.Problem != "" {
		if s.Problem != "" {
			s.Problem += "; "
		}
		s.Problem += "worker " + id + ": " + p.Problem
	}
	if !p.Done {
		s.Done = false
	}
	if !s.Done {
		s.Finished = time.Time{}
	}
}

// Wait follows a load until every worker is done, or those that answer can do no more and one says why, or
// ctx ends.
// Workers that do not answer are waited for. A worker that lost the load, because it restarted or is new,
// is told again what to load: r is what Load was called with. progress, which may be nil, is called with
// every sum.
func (k *Control) Wait(ctx context.Context, r wire.LoadRequest, every time.Duration, progress func(LoadSum)) (LoadSum, error) {
	for {
		sum, err := k.LoadStatus(ctx, r.ID)
		lost := errors.Is(err, ErrNoLoad)
		for _, e := range sum.Missing {
			lost = lost || errors.Is(e, ErrNoLoad)
		}
		if ctx.Err() == nil {
			if progress != nil {
				progress(sum)
			}
			switch {
			case sum.Done:
				return sum, nil
			case sum.Problem != "" && sum.Settled():
				return sum, fmt.Errorf("dataset %s: load %s: %s", k.config.Dataset, r.ID, sum.Problem)
			case sum.FailedFiles > 0 && len(sum.Missing) == 0 && sum.Settled():
				// Failures has fewer than FailedFiles where there are many, and is never empty.
				return sum, fmt.Errorf("dataset %s: load %s: %d of %d files could not be loaded; the first: %s: %s",
					k.config.Dataset, r.ID, sum.FailedFiles, sum.Files, cmp.Or(sum.Failures[0].Quoted, sum.Failures[0].Path), sum.Failures[0].Reason)
			case lost:
				_ = k.Load(ctx, r) // who still does not know it is in the next sum
			}
		}
		if !sleep(ctx, every) {
			if err == nil && len(sum.Missing) > 0 {
				err = &Missing{Dataset: k.config.Dataset, Asked: len(sum.Missing) + len(sum.Workers), Errors: sum.Missing}
			}
			if err != nil {
				return sum, fmt.Errorf("dataset %s: load %s: %w: %w", k.config.Dataset, r.ID, context.Cause(ctx), err)
			}
			return sum, fmt.Errorf("dataset %s: load %s: %w", k.config.Dataset, r.ID, context.Cause(ctx))
		}
	}
}

// Settled says whether every worker that answered is done, or can do no more for now. One that says what it waits for
// is not.
func (s *LoadSum) Settled() bool {
	for _, p := range s.Workers {
		if !p.Done && p.Finished.IsZero() {
			return false
		}
	}
	return true
}

// DeleteLoad ends a load on every worker and unpins what it pinned. It is idempotent.
func (k *Control) DeleteLoad(ctx context.Context, id string) error {
	return k.each(ctx, func(ctx context.Context, _ int, m ring.Member) error {
		err := k.do(ctx, m, http.MethodDelete, wire.PathLoads+"/"+url.PathEscape(id), nil, nil, nil)
		if errors.Is(err, errNotFound) {
			return nil
		}
		return err
	})
}

// Refresh has the worker that lists the bucket list it again, and returns the digest of the new snapshot
// in hex, once all workers that answer have it: whoever asks any of them from then on gets it. It may take as long as a
// listing does, which ctx alone bounds.
func (k *Control) Refresh(ctx context.Context) (string, error) {
	_, list, err := k.members()
	if err != nil {
		return "", err
	}
	m, ok := list.Lister(k.config.Dataset)
	if !ok {
		return "", fmt.Errorf("dataset %s: no worker is ready", k.config.Dataset)
	}
	long := *k
	long.config.Timeout = 24 * time.Hour
	pause := backoff.NewExponentialBackOff()
	pause.MaxInterval = 5 * time.Second
	for tries := 1; ; tries++ {
		var answer struct {
			Snapshot string `json:"snapshot"`
		}
		err := long.do(ctx, m, http.MethodPost, wire.PathRefresh, nil, nil, &answer)
		switch {
		case err == nil:
			return answer.Snapshot, k.followed(ctx, answer.Snapshot)
		// The workers are settling who lists, most likely as they have just started.
		case errors.Is(err, wire.ErrOverloaded) && tries < refreshTries && sleep(ctx, pause.NextBackOff()):
		default:
			return "", fmt.Errorf("dataset %s: refresh by worker %s: %w", k.config.Dataset, m.ID, err)
		}
	}
}

const (
	refreshTries = 8
	// followTimeout bounds how long the other workers may take to get a snapshot of a hundred million bytes and more.
	followTimeout = 10 * time.Minute
	followEvery   = 200 * time.Millisecond
)

// followed waits until the workers have a snapshot, or one that had it has a newer one.
func (k *Control) followed(ctx context.Context, digest string) error {
	bounded, cancel := context.WithTimeout(ctx, followTimeout)
	defer cancel()
	had := make(map[string]bool)
	for {
		all, err := k.Status(bounded)
		var behind []string
		newer := false
		for _, s := range all {
			switch {
			case s.Snapshot == digest:
				had[s.ID] = true
			case had[s.ID]:
				newer = true
			default:
				behind = append(behind, s.ID)
			}
		}
		switch {
		case bounded.Err() == nil && len(all) > 0 && (newer || len(behind) == 0): // with its end none answers any more
			return nil
		case sleep(bounded, followEvery):
		case ctx.Err() != nil:
			return fmt.Errorf("dataset %s: the bucket was listed; waiting for all workers to have the listing: %w", k.config.Dataset, context.Cause(ctx))
		case len(all) == 0:
			return fmt.Errorf("dataset %s: the bucket was listed, and then no worker answered: %w", k.config.Dataset, err)
		default:
			return fmt.Errorf("dataset %s: the bucket was listed, and worker %s has not got the listing after %s", k.config.Dataset, strings.Join(behind, ", "), followTimeout)
		}
	}
}
