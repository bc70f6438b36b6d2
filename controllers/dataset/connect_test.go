package dataset

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/wire"
)

// namespace has one ConfigMap, one Secret and some pods, whatever is asked for.
type namespace struct {
	client.Reader
	list string
	pods []corev1.Pod
}

func (n namespace) Get(_ context.Context, _ client.ObjectKey, into client.Object, _ ...client.GetOption) error {
	switch o := into.(type) {
	case *corev1.ConfigMap:
		o.Data = map[string]string{v1alpha1.KeyMembership: n.list}
	case *corev1.Secret:
		k := wire.GenerateKeys()
		o.Data = map[string][]byte{v1alpha1.KeyRead: wire.FormatKeys(k.Read), v1alpha1.KeyWrite: wire.FormatKeys(k.Write), v1alpha1.KeyControl: wire.FormatKeys(k.Control)}
	}
	return nil
}

func (n namespace) List(_ context.Context, into client.ObjectList, _ ...client.ListOption) error {
	into.(*corev1.PodList).Items = n.pods
	return nil
}

// The list of workers is the tenant's to write.
func TestWorkersAreAskedWhereTheirPodsAre(t *testing.T) {
	n := namespace{
		list: `{"epoch":1,"members":[
			{"id":"data-worker-0","addr":"10.9.9.9:7070","control":"10.9.9.9:22","state":"Ready"},
			{"id":"data-worker-1","addr":"10.9.9.9:7070","control":"10.9.9.9:23","state":"Ready"},
			{"id":"data-worker-2","addr":"10.9.9.9:7070","control":"10.9.9.9:24","state":"Ready"}]}`,
		pods: make([]corev1.Pod, 2),
	}
	n.pods[0].Name, n.pods[0].Status.PodIP = "data-worker-0", "fd00::1"
	n.pods[1].Name = "data-worker-1" // has no address yet
	var dialed []string
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name = "ns", "data"
	k, err := Connect(t.Context(), n, n, d, Options{Dial: func(_ context.Context, _, addr string) (net.Conn, error) {
		dialed = append(dialed, addr)
		return nil, errors.New("refused here")
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	_, err = k.Status(t.Context())
	if want := []string{"[fd00::1]:7071"}; !slices.Equal(dialed, want) {
		t.Errorf("dialed %v, want %v", dialed, want)
	}
	for _, id := range []string{"data-worker-0", "data-worker-1", "data-worker-2"} { // none is passed over
		if err == nil || !strings.Contains(err.Error(), id) {
			t.Errorf("of %s: %v", id, err)
		}
	}
}
