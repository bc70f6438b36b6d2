// Package uninstall takes an installation away so that nothing of it is left: no object, finalizer, mount,
// volume, label or Secret.
//
// The order is what makes that possible. Loads and Datasets go first, while everything that lets them go still
// runs: their controller, and the node service, without which the kubelet could neither unmount a volume nor
// end its pod. Then the webhooks, so that no pod is refused for what is not there any more; then the node
// service, which unmounts what it has; then the controller, which would label the nodes as being without it; and the rest.
//
// It owns the order and the list of what config/ installs (objects.go). Concurrency: one goroutine. Failure:
// it removes and waits until ctx ends, says what it waits for, and can be run again at any point: what is gone
// is passed over. Where the controller does not run, it does the controller's part itself, with the same code.
//
// It may import api and controllers/dataset; cmd imports it.
package uninstall

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/controllers/dataset"
)

// Options of Run.
type Options struct {
	// Namespace is the installation's.
	Namespace string
	// DryRun tells what would be done and does nothing.
	DryRun bool
	// DeletePods ends the pods that use a Dataset instead of waiting for them, but for those that would be made anew.
	DeletePods bool
	// Poll is how often what is waited for is looked at; zero means 2 s.
	Poll time.Duration
	// Out gets a line for everything that is done, and for what is waited for when that changes.
	Out io.Writer
}

// Run takes the installation away. c must read past any cache and have an administrator's rights.
func Run(ctx context.Context, c client.Client, o Options) error {
	if o.Poll == 0 {
		o.Poll = 2 * time.Second
	}
	u := &uninstaller{Options: o, c: c, named: make(map[string]bool)}
	for _, step := range []func(context.Context) error{
		u.loads, u.datasets, u.remains, u.pods, u.volumes,
		u.webhooks, u.node, u.programs, u.labels, u.others,
	} {
		if err := step(ctx); err != nil {
			return fmt.Errorf("uninstall: %w; run it again to go on", err)
		}
	}
	switch {
	case o.DryRun:
		u.say("nothing was changed")
	case !u.did:
		u.say("nothing of an installation was left")
	default:
		u.say("done")
	}
	return nil
}

type uninstaller struct {
	Options
	c     client.Client
	did   bool            // something was there to remove
	named map[string]bool // the UIDs of Datasets that were there
	alone *bool
}

func (u *uninstaller) say(format string, a ...any) { fmt.Fprintf(u.Out, format+"\n", a...) }

// until calls f until it has nothing left to wait for. In a dry run once.
func (u *uninstaller) until(ctx context.Context, f func(context.Context) (waits string, err error)) error {
	said := ""
	timer := time.NewTimer(0)
	defer timer.Stop()
	<-timer.C
	for {
		waits, err := f(ctx)
		switch {
		case err != nil && ctx.Err() != nil: // which says less than what it waited for
		case err != nil && !again(err):
			return err
		case err == nil && waits == "" || u.DryRun:
			return nil
		}
		if waits != "" && waits != said {
			u.say("%s", waits)
			said = waits
		}
		timer.Reset(u.Poll)
		select {
		case <-ctx.Done():
			if said == "" {
				return errors.Join(err, ctx.Err())
			}
			return fmt.Errorf("gave up %s", said)
		case <-timer.C:
		}
	}
}

// again says whether an error is of what two who do the same at once run into.
func again(err error) bool { return apierrors.IsConflict(err) || apierrors.IsNotFound(err) }

// absent says whether an error means that the cluster does not know the kind.
func absent(err error) bool { return meta.IsNoMatchError(err) || apierrors.IsNotFound(err) }

// remove deletes an object that is there and not being deleted yet.
func (u *uninstaller) remove(ctx context.Context, o client.Object) error {
	u.did = true
	if !o.GetDeletionTimestamp().IsZero() {
		return nil
	}
	name := u.name(o)
	if u.DryRun {
		u.say("would delete %s", name)
		return nil
	}
	err := u.c.Delete(ctx, o, client.PropagationPolicy(metav1.DeletePropagationBackground))
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	u.say("deleted %s", name)
	return nil
}

func (u *uninstaller) name(o client.Object) string {
	kind := o.GetObjectKind().GroupVersionKind().Kind
	if kind == "" {
		if gvk, err := u.c.GroupVersionKindFor(o); err == nil {
			kind = gvk.Kind
		}
	}
	if ns := o.GetNamespace(); ns != "" {
		return kind + " " + ns + "/" + o.GetName()
	}
	return kind + " " + o.GetName()
}

// noController says whether the controller does not run, so that its part is left to do. It is said once.
func (u *uninstaller) noController(ctx context.Context) (bool, error) {
	d := &appsv1.Deployment{}
	err := u.c.Get(ctx, client.ObjectKey{Namespace: u.Namespace, Name: "stepcache-controller"}, d)
	if client.IgnoreNotFound(err) != nil {
		return false, err
	}
	alone := err != nil || d.Status.AvailableReplicas == 0
	if alone && (u.alone == nil || !*u.alone) {
		u.say("no controller runs in namespace %s: its part is done here; what its workers still pin or count is lost with them", u.Namespace)
	}
	u.alone = &alone
	return alone, nil
}

// loads deletes the DataLoads of all namespaces.
func (u *uninstaller) loads(ctx context.Context) error {
	return u.until(ctx, func(ctx context.Context) (string, error) {
		all := &v1alpha1.DataLoadList{}
		if err := u.c.List(ctx, all); absent(err) || err == nil && len(all.Items) == 0 {
			return "", nil
		} else if err != nil {
			return "", err
		}
		var names []string
		for i := range all.Items {
			l := &all.Items[i]
			if err := u.remove(ctx, l); err != nil {
				return "", err
			}
			names = append(names, l.Namespace+"/"+l.Name)
		}
		if u.DryRun {
			return "", nil
		}
		alone, err := u.noController(ctx)
		if err != nil {
			return "", err
		}
		for i := range all.Items {
			// Their pins go with the workers.
			if l := all.Items[i].DeepCopy(); alone && controllerutil.RemoveFinalizer(l, v1alpha1.Finalizer) {
				if err := u.c.Patch(ctx, l, client.MergeFrom(&all.Items[i])); client.IgnoreNotFound(err) != nil {
					return "", fmt.Errorf("dataload %s: %w", names[i], err)
				}
			}
		}
		return "waiting for the end of DataLoads: " + some(names), nil
	})
}

// datasets deletes the Datasets of all namespaces and waits for the pods that use them.
func (u *uninstaller) datasets(ctx context.Context) error {
	return u.until(ctx, func(ctx context.Context) (string, error) {
		all := &v1alpha1.DatasetList{}
		if err := u.c.List(ctx, all); absent(err) || err == nil && len(all.Items) == 0 {
			return "", nil
		} else if err != nil {
			return "", err
		}
		for i := range all.Items {
			u.named[string(all.Items[i].UID)] = true
			if err := u.remove(ctx, &all.Items[i]); err != nil {
				return "", err
			}
		}
		alone := false
		if !u.DryRun {
			var err error
			if alone, err = u.noController(ctx); err != nil {
				return "", err
			}
		}
		var waits []string
		for i := range all.Items {
			wait, err := u.dataset(ctx, &all.Items[i], alone)
			if err != nil {
				return "", err
			}
			waits = append(waits, wait)
		}
		return "waiting for " + strings.Join(waits, "; "), nil
	})
}

// dataset says what a Dataset waits for.
func (u *uninstaller) dataset(ctx context.Context, d *v1alpha1.Dataset, alone bool) (waits string, err error) {
	name := d.Namespace + "/" + d.Name
	pods, err := dataset.Users(ctx, u.c, d)
	if err != nil {
		return "", err
	}
	if len(pods) > 0 {
		users := fmt.Sprintf("%s that use Dataset %s", dataset.Named(pods), name)
		if !u.DeletePods {
			if u.DryRun {
				u.say("would wait for %s", users)
			}
			return users + " (end them, or run with --delete-pods)", nil
		}
		if u.DryRun {
			u.say("would delete %s", users)
		}
		makers, err := u.end(ctx, pods)
		if err != nil {
			return "", err
		}
		waits := "the end of " + users
		if len(makers) > 0 {
			// To delete its pods again and again would never end.
			waits += fmt.Sprintf("; those of %s would be made anew: scale it to 0, or delete it", some(makers))
			if u.DryRun {
				u.say("would wait for %s", waits)
			}
		}
		return waits, nil
	}
	if alone && !u.DryRun {
		fresh := &v1alpha1.Dataset{}
		if err := u.c.Get(ctx, client.ObjectKeyFromObject(d), fresh); err != nil {
			return "", client.IgnoreNotFound(err)
		}
		if dataset.HoldsWrites(fresh) && !dataset.AcceptsLoss(fresh) {
			return fmt.Sprintf("Dataset %s, whose workers may hold what the bucket does not have, which only a controller sees: start it again; %s", name, dataset.WayOut(fresh)), nil
		}
		if _, err := dataset.Release(ctx, u.c, u.c, fresh); err != nil {
			return "", fmt.Errorf("dataset %s: %w", name, err)
		}
	}
	if f := slices.DeleteFunc(slices.Clone(d.Finalizers), func(f string) bool { return f == v1alpha1.Finalizer }); len(f) > 0 {
		return fmt.Sprintf("Dataset %s, on which others have the finalizers %s", name, strings.Join(f, ", ")), nil
	}
	if c := meta.FindStatusCondition(d.Status.Conditions, v1alpha1.ConditionFlushed); c != nil && c.Status != metav1.ConditionTrue && !d.DeletionTimestamp.IsZero() {
		return fmt.Sprintf("the end of Dataset %s: %s; %s", name, c.Message, dataset.WayOut(d)), nil
	}
	return "the end of Dataset " + name, nil
}

// end deletes pods, once, but not those that would be made anew: it names who does that.
func (u *uninstaller) end(ctx context.Context, pods []string) (makers []string, err error) {
	for _, name := range pods {
		p := &corev1.Pod{}
		p.Namespace, p.Name, _ = strings.Cut(name, "/")
		if err := u.c.Get(ctx, client.ObjectKeyFromObject(p), p); apierrors.IsNotFound(err) {
			continue
		} else if err != nil {
			return nil, err
		}
		maker, err := u.maker(ctx, p)
		if err != nil {
			return nil, err
		}
		switch {
		case maker != "" && !slices.Contains(makers, maker):
			makers = append(makers, maker)
		case maker == "" && !u.DryRun:
			if err := u.remove(ctx, p); err != nil {
				return nil, err
			}
		}
	}
	return makers, nil
}

// maker names who makes a new pod when this one is deleted; "" if nobody does. A Job does a few times only.
func (u *uninstaller) maker(ctx context.Context, p *corev1.Pod) (string, error) {
	owner := metav1.GetControllerOf(p)
	if owner == nil || !slices.Contains([]string{"DaemonSet", "ReplicaSet", "ReplicationController", "StatefulSet"}, owner.Kind) {
		return "", nil
	}
	o := &metav1.PartialObjectMetadata{}
	o.SetGroupVersionKind(schema.FromAPIVersionAndKind(owner.APIVersion, owner.Kind))
	err := u.c.Get(ctx, client.ObjectKey{Namespace: p.Namespace, Name: owner.Name}, o)
	if absent(err) || err == nil && !o.DeletionTimestamp.IsZero() {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if above := metav1.GetControllerOf(o); above != nil { // a Deployment, say: to scale the ReplicaSet is no use
		owner = above
	}
	return owner.Kind + " " + p.Namespace + "/" + owner.Name, nil
}

// some are the first names of a list.
func some(names []string) string {
	const most = 10
	text := strings.Join(names[:min(len(names), most)], ", ")
	if len(names) > most {
		text += fmt.Sprintf(" and %d others", len(names)-most)
	}
	return text
}
