package webhook

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/go-logr/logr"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	kclient "sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// Names of an installation's objects; the manifests in config/webhook have the same.
const (
	ServiceName             = "stepcache-webhook"
	SecretName              = "stepcache-webhook-cert"
	InjectConfiguration     = "stepcache-inject"
	LocalityConfiguration   = "stepcache-locality"
	ValidationConfiguration = "stepcache-validation"
)

// Options of a webhook's process.
type Options struct {
	// Namespace is the installation's own.
	Namespace string
	// Image, PullPolicy, PullSecrets and StageLimit are the Injector's.
	Image       string
	PullPolicy  corev1.PullPolicy
	PullSecrets []string
	StageLimit  int64
	// SnapshotBytes is the Holdings' Room.
	SnapshotBytes int64
	// Host and Port are where it serves.
	Host string
	Port int
	// Metrics and Probes are addresses to listen at; "0" turns one off.
	Metrics, Probes string
	// Hosts are more names for the certificate than the Service's.
	Hosts []string
	// Dialer connects to workers; nil means a net.Dialer.
	Dialer func(ctx context.Context, network, addr string) (net.Conn, error)
	// Now is the clock of certificates; nil means time.Now.
	Now    func() time.Time
	Logger *slog.Logger
	// Again allows several in one process, which only tests want.
	Again bool
}

// New returns a manager that serves the webhook, to be started. Its replicas share nothing but the Secret of
// the certificates, and need no leader.
func New(cluster *rest.Config, o Options) (manager.Manager, error) {
	m, err := newManager(cluster, o)
	if err != nil {
		return nil, fmt.Errorf("webhook: %w", err)
	}
	return m, nil
}

func newManager(cluster *rest.Config, o Options) (manager.Manager, error) {
	if o.Namespace == "" {
		return nil, errors.New("the installation's namespace is not known: set --namespace or POD_NAMESPACE")
	}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, admissionregistrationv1.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	direct, err := kclient.New(cluster, kclient.Options{Scheme: scheme})
	if err != nil {
		return nil, err
	}
	certs := &Certs{
		Client: direct, Secret: types.NamespacedName{Namespace: o.Namespace, Name: SecretName},
		Hosts: append([]string{
			ServiceName + "." + o.Namespace + ".svc",
			ServiceName + "." + o.Namespace + ".svc.cluster.local",
		}, o.Hosts...),
		Mutating:   []string{InjectConfiguration, LocalityConfiguration},
		Validating: []string{ValidationConfiguration},
		Now:        o.Now, Logger: o.Logger,
	}
	ours, err := labels.NewRequirement(v1alpha1.LabelDataset, selection.Exists, nil)
	if err != nil {
		return nil, err
	}
	server := webhook.NewServer(webhook.Options{Host: o.Host, Port: o.Port, TLSOpts: []func(*tls.Config){func(t *tls.Config) {
		t.GetCertificate = certs.Certificate
		t.MinVersion = tls.VersionTLS12
		t.NextProtos = []string{"http/1.1"} // see once
	}}})
	m, err := ctrl.NewManager(cluster, ctrl.Options{
		Scheme: scheme, Logger: logr.FromSlogHandler(o.Logger.Handler()),
		Cache: cache.Options{
			DefaultTransform: cache.TransformStripManagedFields(),
			ByObject: map[kclient.Object]cache.ByObject{
				&corev1.ConfigMap{}: {Label: labels.NewSelector().Add(*ours)},
				&corev1.Node{}:      {Transform: slim},
			},
		},
		Client:                 kclient.Options{Cache: &kclient.CacheOptions{DisableFor: []kclient.Object{&corev1.Secret{}}}},
		Metrics:                metricsserver.Options{BindAddress: o.Metrics},
		HealthProbeBindAddress: o.Probes,
		WebhookServer:          server,
		Controller:             config.Controller{SkipNameValidation: &o.Again},
	})
	if err != nil {
		return nil, err
	}
	// A call must not be the one that starts an informer and waits for it.
	for _, kind := range []kclient.Object{&v1alpha1.Dataset{}, &v1alpha1.DataLoad{}, &corev1.Namespace{}, &corev1.Node{}, &corev1.ConfigMap{}} {
		if _, err := m.GetCache().GetInformer(context.Background(), kind, cache.BlockUntilSynced(false)); err != nil {
			return nil, err
		}
	}
	known := informed{m.GetCache()}
	holdings := &Holdings{Cache: m.GetCache(), Live: m.GetAPIReader(), Dialer: o.Dialer, Room: o.SnapshotBytes, Logger: o.Logger}
	if err := holdings.SetupWithManager(m); err != nil {
		return nil, err
	}
	injector := &Injector{Cluster: known, Image: o.Image, PullPolicy: o.PullPolicy, PullSecrets: o.PullSecrets, StageLimit: o.StageLimit, NewID: newID}
	placer := &Placer{Nodes: known, Holdings: holdings}
	for path, h := range map[string]admission.Handler{
		PathInject:   &Inject{injector, placer, o.Logger},
		PathLocality: &Locality{injector, placer, o.Logger},
		PathValidate: &Validate{known},
	} {
		m.GetWebhookServer().Register(path, once{&admission.Webhook{Handler: h}}) // asking for it has the manager start it
	}
	if err := m.Add(manager.RunnableFunc(func(ctx context.Context) error {
		certs.Run(ctx)
		return nil
	})); err != nil {
		return nil, err
	}
	if err := m.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return nil, err
	}
	return m, m.AddReadyzCheck("ready", func(r *http.Request) error {
		if _, err := certs.Certificate(nil); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(r.Context(), time.Second)
		defer cancel()
		if !m.GetCache().WaitForCacheSync(ctx) {
			return errors.New("the cluster's objects are not all read yet")
		}
		return server.StartedChecker()(r)
	})
}

// once answers one call a connection. A call on a connection whose other end died fails with an error that
// Argo takes for final (EOF, a deadline); one that has to connect is refused, or goes to another replica, and
// a refused one Argo tries again. A handshake is the price.
type once struct{ http.Handler }

func (o once) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Connection", "close")
	o.Handler.ServeHTTP(w, r)
}

// newID is random: nobody can have another pod's.
func newID() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
