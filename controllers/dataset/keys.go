package dataset

import (
	"context"
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	tierclient "github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/wire"
)

// annotationNext, on the keys' Secret, is the value of AnnotationRotateKeys whose keys every worker must
// know before anybody uses them.
const annotationNext = v1alpha1.Group + "/rotating"

// makeKeys keeps the Secret with the Dataset's keys and the one with the read key alone.
//
// A rotation takes two steps, since mounted Secrets change at different times in different pods: first the
// new keys are added behind the old ones, so that workers accept them while everybody still uses the old;
// rotate, once every worker answers to the new control key, puts them in front. The old ones stay accepted
// until the next rotation, or until the annotation is removed.
func (r *Reconciler) makeKeys(ctx context.Context, p *pass) error {
	secret := &corev1.Secret{ObjectMeta: p.object(v1alpha1.KeysName(p.dataset.Name), v1alpha1.ComponentWorker)}
	have := &corev1.Secret{}
	err := r.live.Get(ctx, client.ObjectKeyFromObject(secret), have)
	if client.IgnoreNotFound(err) != nil {
		return err
	}
	// Before anybody is told to delete it: it may hold a bucket's credentials.
	if err == nil && foreign(have, p.dataset) {
		return taken(v1alpha1.ConditionWorkersReady, have)
	}
	p.keys, err = keysOf(have)
	if err != nil && !apierrors.IsNotFound(err) && len(have.Data) > 0 {
		return block(v1alpha1.ConditionWorkersReady, ReasonKeysInvalid, "secret %q: %w; delete the Secret to have new keys made, then the workers' pods", have.Name, err)
	}
	done, next := have.Annotations[v1alpha1.AnnotationRotated], have.Annotations[annotationNext]
	want := p.dataset.Annotations[v1alpha1.AnnotationRotateKeys]
	switch {
	case len(p.keys.Control) == 0:
		p.keys, done, next = wire.GenerateKeys(), want, ""
	case want == "":
		p.keys, done, next = head(p.keys), "", ""
	case want != done && want != next:
		p.keys, next = behind(head(p.keys), wire.GenerateKeys()), want
	}
	return r.putKeys(ctx, p, done, next)
}

// rotate puts new keys in front once every worker accepts them.
func (r *Reconciler) rotate(ctx context.Context, p *pass) error {
	want := p.dataset.Annotations[v1alpha1.AnnotationRotateKeys]
	if len(p.keys.Control) < 2 || want == "" || len(p.missing) > 0 || len(p.status) == 0 {
		return nil
	}
	secret := &corev1.Secret{}
	if err := r.live.Get(ctx, client.ObjectKey{Namespace: p.dataset.Namespace, Name: v1alpha1.KeysName(p.dataset.Name)}, secret); err != nil {
		return err
	}
	if secret.Annotations[annotationNext] != want {
		return nil
	}
	k, err := tierclient.NewControl(tierclient.ControlConfig{
		Dataset: p.name(), Membership: p.members, Keys: wire.Keys{Control: p.keys.Control[1:]},
		Timeout: askTimeout, Dialer: r.Dial,
	})
	if err != nil {
		return err
	}
	defer k.Close()
	if _, err := k.Status(ctx); err != nil {
		p.again = r.Poll / 5 // a worker does not know them yet
		return nil
	}
	swap := func(k []wire.Key) []wire.Key { return []wire.Key{k[1], k[0]} }
	p.keys = wire.Keys{Read: swap(p.keys.Read), Write: swap(p.keys.Write), Control: swap(p.keys.Control)}
	if err := r.putKeys(ctx, p, want, ""); err != nil {
		return err
	}
	p.unsay("KeysRotated") // who waits for it waits for that of this rotation
	p.note("KeysRotated", "RotateKeys", "new keys are in use for %q; the old ones are accepted until the next rotation or until annotation %s is removed", want, v1alpha1.AnnotationRotateKeys)
	return nil
}

func (r *Reconciler) putKeys(ctx context.Context, p *pass, done, next string) error {
	all := &corev1.Secret{ObjectMeta: p.object(v1alpha1.KeysName(p.dataset.Name), v1alpha1.ComponentWorker), Type: corev1.SecretTypeOpaque}
	all.Annotations = map[string]string{v1alpha1.AnnotationRotated: done, annotationNext: next}
	all.Data = map[string][]byte{
		v1alpha1.KeyRead: wire.FormatKeys(p.keys.Read), v1alpha1.KeyWrite: wire.FormatKeys(p.keys.Write), v1alpha1.KeyControl: wire.FormatKeys(p.keys.Control),
	}
	if err := r.apply(ctx, p, r.live, v1alpha1.ConditionWorkersReady, all); err != nil {
		return err
	}
	reader := &corev1.Secret{ObjectMeta: p.object(v1alpha1.ReaderName(p.dataset.Name), v1alpha1.ComponentWorker), Type: corev1.SecretTypeOpaque}
	reader.Data = readerData(p)
	return r.apply(ctx, p, r.live, v1alpha1.ConditionVolumeReady, reader)
}

// readerData is what the Secret of readers holds, and its copies in other namespaces.
func readerData(p *pass) map[string][]byte {
	data := map[string][]byte{
		v1alpha1.KeyRead: wire.FormatKeys(p.keys.Read[:1]),
		// Nodes take these from here, since a PersistentVolume cannot be changed.
		v1alpha1.AttributeCopies: []byte(strconv.Itoa(int(p.dataset.Spec.Workers.Copies))),
	}
	if memory, ok := p.dataset.Spec.Node.MemoryBytes(); ok {
		data[v1alpha1.AttributeNodeMemory] = []byte(strconv.FormatInt(memory, 10))
	}
	return data
}

// keysOf reads the keys of a Secret; none where it has none.
func keysOf(s *corev1.Secret) (wire.Keys, error) {
	var k wire.Keys
	for _, role := range []struct {
		name string
		keys *[]wire.Key
	}{{v1alpha1.KeyRead, &k.Read}, {v1alpha1.KeyWrite, &k.Write}, {v1alpha1.KeyControl, &k.Control}} {
		parsed, err := wire.ParseKeys(s.Data[role.name])
		if err != nil {
			return wire.Keys{}, fmt.Errorf("key %s: %w", role.name, err)
		}
		*role.keys = parsed
	}
	n := len(k.Control)
	if len(k.Read) != n || len(k.Write) != n {
		return wire.Keys{}, fmt.Errorf("its keys are %d read, %d write and %d control: they must be as many", len(k.Read), len(k.Write), n)
	}
	return k, nil
}

// head are the current keys alone.
func head(k wire.Keys) wire.Keys {
	return wire.Keys{Read: k.Read[:1], Write: k.Write[:1], Control: k.Control[:1]}
}

// behind adds new keys behind the current ones.
func behind(k, next wire.Keys) wire.Keys {
	two := func(a, b []wire.Key) []wire.Key { return []wire.Key{a[0], b[0]} }
	return wire.Keys{Read: two(k.Read, next.Read), Write: two(k.Write, next.Write), Control: two(k.Control, next.Control)}
}

func (p *pass) name() string { return p.dataset.Namespace + "/" + p.dataset.Name }
