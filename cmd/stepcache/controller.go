package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"

	"github.com/stepcache/stepcache/controllers"
	"github.com/stepcache/stepcache/controllers/dataset"
)

func controllerCommand() *cobra.Command {
	var o controllers.Options
	var store string
	var env []string
	var level slog.Level
	cmd := &cobra.Command{
		Use:   "controller",
		Short: "Run the Dataset and DataLoad controllers of a cluster",
		Long: `Makes Datasets and DataLoads of a cluster real until SIGTERM: workers, keys, volumes, loads, status; and labels
nodes without the node service, which pods with Datasets keep away from. It talks to the cluster of its pod, or of
$KUBECONFIG. Several replicas agree on one that acts.

Workers run the image that --image named, or that this pod had, when their Dataset was made: a new version of the controller leaves
them and their memory alone. A new value of a Dataset's annotation data.stepcache.dev/rollout moves that
Dataset's workers to the current image, one at a time, each after it handed over what it holds.`,
		Example: "  stepcache controller --namespace stepcache-system --image registry.example/stepcache:v1 --store csi",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch o.Dataset.Store = dataset.Store(store); {
			case o.Dataset.Store != dataset.StoreCSI && o.Dataset.Store != dataset.StoreEmptyDir:
				return usage{fmt.Errorf("controller: --store %q: want %s or %s", store, dataset.StoreCSI, dataset.StoreEmptyDir)}
			case o.Dataset.Namespace == "":
				return usage{errors.New("controller: --namespace is missing: name the namespace of this installation, or set POD_NAMESPACE")}
			}
			var err error
			if o.Dataset.Env, err = workerEnv(env); err != nil {
				return usage{err}
			}
			if err := needImage("controller", o.Dataset.Image); err != nil {
				return err
			}
			o.Logger = logr.FromSlogHandler(logger(level).Handler())
			ctrl.SetLogger(o.Logger)
			klog.SetLogger(o.Logger)
			cluster, err := ctrl.GetConfig()
			if err != nil {
				return noCluster("controller", "$KUBECONFIG", err)
			}
			if o.Dataset.Image == "" {
				if o.Dataset.Image, err = ownImage(cmd.Context(), cluster, o.Dataset.Namespace, "controller"); err != nil {
					return err
				}
			}
			m, err := controllers.New(cluster, o)
			if err != nil {
				return err
			}
			return m.Start(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Dataset.Namespace, "namespace", os.Getenv("POD_NAMESPACE"), "namespace of this installation (default $POD_NAMESPACE)")
	f.StringVar(&o.Dataset.Image, "image", "", "image of the workers of new Datasets (default: that of the container controller of the pod $POD_NAME)")
	f.StringVar(&store, "store", string(dataset.StoreCSI), "what holds the workers' bytes: csi (huge pages, needs the node service on every node), or emptydir")
	f.StringArrayVar(&env, "worker-env", nil, "NAME=VALUE: HTTPS_PROXY, HTTP_PROXY or NO_PROXY of workers that start from now on, for their buckets (may be repeated)")
	levelFlag(cmd, &level)
	f.BoolVar(&o.LeaderElection, "leader-elect", true, "agree with other replicas on one that acts")
	f.StringVar(&o.Metrics, "metrics", ":8080", "address of /metrics; 0 for none")
	f.StringVar(&o.Probes, "probes", ":8081", "address of /healthz and /readyz; 0 for none")
	return cmd
}

// workerEnv reads the flag of that name.
func workerEnv(given []string) (env []corev1.EnvVar, err error) {
	for _, g := range given {
		name, value, ok := strings.Cut(g, "=")
		if !ok || name != "HTTPS_PROXY" && name != "HTTP_PROXY" && name != "NO_PROXY" {
			return nil, fmt.Errorf("controller: --worker-env %q: want HTTPS_PROXY, HTTP_PROXY or NO_PROXY, = and a value", g)
		}
		if slices.ContainsFunc(env, func(e corev1.EnvVar) bool { return e.Name == name }) {
			return nil, fmt.Errorf("controller: --worker-env: %s is given twice; write all of it in one", name)
		}
		env = append(env, corev1.EnvVar{Name: name, Value: value})
	}
	return env, nil
}
