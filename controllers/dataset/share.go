package dataset

import (
	"context"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// Reasons of the condition Shared.
const (
	ReasonShared           = "Shared"
	ReasonNamespaceMissing = "NamespaceMissing" // it gets its copy once it is there
)

// copyAgain is how long a copy that was looked at is taken to be as it was left. Secrets are not watched,
// which would be to read all of a cluster's.
const copyAgain = time.Minute

// copied is what is known of one copy.
type copied struct {
	hash string
	at   time.Time
}

// share keeps a copy of the reader Secret in every namespace that the Dataset is shared with, since the
// kubelet takes an inline volume's Secret from the pod's own namespace only; and of a Dataset that takes puts,
// for the same reason, one of its S3 endpoint's keys that only read.
//
// A copy has no owner, which would have to be of its own namespace. So the status says where copies are, and
// says it before one is made: a namespace is written down in one pass and gets its copy in the next, and is
// struck off once its copy is gone. Whatever is interrupted, no copy is forgotten.
func (r *Reconciler) share(ctx context.Context, p *pass) error {
	d := p.dataset
	recorded := slices.Clone(d.Status.SharedWith)
	wanted := otherNamespaces(d)
	d.Status.SharedWith = union(recorded, wanted)
	if len(d.Status.SharedWith) == 0 {
		d.Status.SharedWith = nil
		meta.RemoveStatusCondition(&d.Status.Conditions, v1alpha1.ConditionShared)
		return nil
	}
	copies := copiesOf(p)
	var missing []string
	taken := make(map[string][]string) // the namespaces, by the name that is somebody else's
	var refused []string               // what a quota, a policy or the copy itself (immutable) does not allow
	gone := make(map[v1alpha1.Namespace]bool)
	for _, ns := range d.Status.SharedWith {
		if !slices.Contains(wanted, ns) {
			if err := removeCopies(ctx, r.client, r.live, d, string(ns)); refuses(err) {
				refused = append(refused, fmt.Sprintf("namespace %s does not let its copy go: %v", ns, err))
				continue
			} else if err != nil {
				return err
			}
			p.forgetCopies(string(ns))
			gone[ns] = true
			continue
		}
		there, err := r.namespaceTakesObjects(ctx, string(ns))
		if err != nil {
			return err
		}
		if !there {
			p.forgetCopies(string(ns))
			gone[ns] = true
			missing = append(missing, string(ns))
			continue
		}
		if !slices.Contains(recorded, ns) {
			p.soon(time.Millisecond)
			continue
		}
		for _, c := range copies {
			switch ok, err := r.putCopy(ctx, p, string(ns), c.name, c.data); {
			case refuses(err):
				refused = append(refused, fmt.Sprintf("namespace %s does not take its copy, and until it does pods there cannot %s: %v", ns, c.use, err))
			case err != nil:
				return err
			case !ok:
				taken[c.name] = append(taken[c.name], string(ns))
			}
		}
	}
	d.Status.SharedWith = slices.DeleteFunc(d.Status.SharedWith, func(ns v1alpha1.Namespace) bool { return gone[ns] })
	switch {
	case len(taken) > 0 || len(refused) > 0:
		var texts []string
		reason := ReasonRefused
		for _, c := range copies {
			if in := taken[c.name]; len(in) > 0 {
				reason = v1alpha1.ReasonNameTaken
				texts = append(texts, fmt.Sprintf("secret %q exists in %s and is not this Dataset's copy: delete or rename it there; until then pods there cannot %s",
					c.name, strings.Join(in, ", "), c.use))
			}
		}
		text := strings.Join(append(texts, refused...), "; ")
		p.condition(v1alpha1.ConditionShared, metav1.ConditionFalse, reason, "%s", text)
		p.warn("ShareBlocked", "Share", "%s", text)
	case len(wanted) == 0:
		meta.RemoveStatusCondition(&d.Status.Conditions, v1alpha1.ConditionShared)
	case len(missing) > 0:
		p.condition(v1alpha1.ConditionShared, metav1.ConditionFalse, ReasonNamespaceMissing, "there is no namespace %s yet; once it is there its pods can mount the Dataset", strings.Join(missing, ", "))
	default:
		p.unsay("ShareBlocked")
		p.condition(v1alpha1.ConditionShared, metav1.ConditionTrue, ReasonShared, "pods of %d other namespaces can mount the Dataset", len(wanted))
	}
	return nil
}

// shared is what every namespace that the Dataset is shared with gets a copy of.
type shared struct {
	name string
	data map[string][]byte
	use  string // what pods cannot do without it
}

func copiesOf(p *pass) []shared {
	d := p.dataset
	all := []shared{{v1alpha1.SharedReaderName(d.Namespace, d.Name), readerData(p), "mount the Dataset"}}
	if writable(d) {
		all = append(all, shared{v1alpha1.SharedS3Name(d.Namespace, d.Name), sharedAccess(p), "read from its S3 endpoint"})
	}
	return all
}

func (p *pass) forgetCopies(namespace string) {
	maps.DeleteFunc(p.copies, func(k client.ObjectKey, _ copied) bool { return k.Namespace == namespace })
}

// putCopy makes one copy as it should be; false where a Secret of its name is somebody else's.
func (r *Reconciler) putCopy(ctx context.Context, p *pass, namespace, name string, data map[string][]byte) (bool, error) {
	d := p.dataset
	want := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name,
			Labels: map[string]string{
				v1alpha1.LabelSharedFrom: d.Namespace, v1alpha1.LabelDataset: d.Name, v1alpha1.LabelComponent: v1alpha1.ComponentWorker,
				"app.kubernetes.io/name": "stepcache", "app.kubernetes.io/managed-by": "stepcache",
			},
		},
		Type: corev1.SecretTypeOpaque, Data: data,
	}
	hash, err := hashOf(want.Data)
	if err != nil {
		return false, err
	}
	key := client.ObjectKeyFromObject(want)
	if c := p.copies[key]; c.hash == hash && p.now.Sub(c.at) < copyAgain {
		return true, nil
	}
	have := &corev1.Secret{}
	err = r.live.Get(ctx, key, have)
	switch {
	case apierrors.IsNotFound(err):
		err = r.client.Create(ctx, want)
	case err != nil:
	case !isCopy(have, d):
		return false, nil
	case !reflect.DeepEqual(have.Data, want.Data) || !contains(have.Labels, want.Labels):
		have.Data = want.Data
		maps.Copy(have.Labels, want.Labels)
		err = r.client.Update(ctx, have)
	}
	if err != nil {
		return false, fmt.Errorf("secret %s: %w", key, err)
	}
	p.copies[key] = copied{hash, p.now}
	return true, nil
}

// removeCopies takes the copies in a namespace away.
func removeCopies(ctx context.Context, c client.Client, live client.Reader, d *v1alpha1.Dataset, namespace string) error {
	for _, name := range []string{v1alpha1.SharedReaderName(d.Namespace, d.Name), v1alpha1.SharedS3Name(d.Namespace, d.Name)} {
		if err := removeCopy(ctx, c, live, d, client.ObjectKey{Namespace: namespace, Name: name}); err != nil {
			return err
		}
	}
	return nil
}

// removeCopy takes a copy away; a Secret of its name that is somebody else's stays.
func removeCopy(ctx context.Context, c client.Client, live client.Reader, d *v1alpha1.Dataset, key client.ObjectKey) error {
	s := &corev1.Secret{}
	if err := live.Get(ctx, key, s); err != nil {
		return client.IgnoreNotFound(err)
	}
	if !isCopy(s, d) {
		return nil
	}
	if err := c.Delete(ctx, s, client.Preconditions{UID: &s.UID}); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("secret %s: %w", key, err)
	}
	return nil
}

// isCopy says whether a Secret is a copy of one of the Dataset's.
func isCopy(s *corev1.Secret, d *v1alpha1.Dataset) bool {
	return s.Labels[v1alpha1.LabelSharedFrom] == d.Namespace && s.Labels[v1alpha1.LabelDataset] == d.Name
}

func contains(have, want map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

// otherNamespaces are those that the Dataset is shared with, without its own, sorted.
func otherNamespaces(d *v1alpha1.Dataset) []v1alpha1.Namespace {
	var all []v1alpha1.Namespace
	for _, ns := range d.Spec.ShareWith {
		if string(ns) != d.Namespace {
			all = append(all, ns)
		}
	}
	return union(all, nil)
}

// union is both lists, sorted, each entry once.
func union(a, b []v1alpha1.Namespace) []v1alpha1.Namespace {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

func (r *Reconciler) namespaceTakesObjects(ctx context.Context, name string) (bool, error) {
	ns := &corev1.Namespace{}
	err := r.client.Get(ctx, client.ObjectKey{Name: name}, ns)
	return err == nil && ns.DeletionTimestamp.IsZero(), client.IgnoreNotFound(err)
}

// sharers are the Datasets that wait for a namespace that has appeared.
func (r *Reconciler) sharers(ctx context.Context, o client.Object) []reconcile.Request {
	all := &v1alpha1.DatasetList{}
	if r.client.List(ctx, all) != nil {
		return nil // they come again by themselves
	}
	var waiting []reconcile.Request
	for i := range all.Items {
		if d := &all.Items[i]; d.Namespace != o.GetName() && d.SharesWith(o.GetName()) {
			waiting = append(waiting, reconcile.Request{NamespacedName: types.NamespacedName{Namespace: d.Namespace, Name: d.Name}})
		}
	}
	return waiting
}
