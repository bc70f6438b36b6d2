package dataset

import (
	"context"
	"errors"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// Reasons of the condition Sourced.
const (
	ReasonInvalidSpec        = "InvalidSpec"        // only a change of the spec helps
	ReasonCredentialsMissing = "CredentialsMissing" // a Secret is not there, or lacks a key
	ReasonAccessDenied       = "AccessDenied"       // the bucket refuses the credentials
	ReasonNoSuchBucket       = "NoSuchBucket"
	ReasonUnavailable        = "Unavailable" // the bucket does not answer, or not well
	ReasonListing            = "Listing"     // the bucket is being listed
	ReasonNoWorker           = "NoWorker"    // nobody is there to ask
	ReasonListed             = "Listed"
	ReasonNotShared          = "NotShared"       // a source is a Dataset that this one may not read
	ReasonDatasetNotFound    = "DatasetNotFound" // a source is a Dataset that is not there
	ReasonReachable          = "Reachable"       // of a Dataset that takes puts, and so has no snapshot
)

// Validate refuses what passed the API server's rules and still cannot work on a cluster.
func (r *Reconciler) validate(_ context.Context, p *pass) error {
	err := p.dataset.CheckCluster().ToAggregate()
	_, terr := r.workerConfig(p.dataset)
	if err := errors.Join(asError(err), terr); err != nil {
		p.warn(ReasonInvalidSpec, "Validate", "%v", err)
		return block(v1alpha1.ConditionSourced, ReasonInvalidSpec, "%w", err)
	}
	return nil
}

// asError keeps a nil Aggregate from becoming a non-nil error.
func asError(err error) error {
	if err == nil {
		return nil
	}
	return err
}
