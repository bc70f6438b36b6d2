package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/dustin/go-humanize"
	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"

	"github.com/stepcache/stepcache/webhook"
)

func webhookCommand() *cobra.Command {
	var o webhook.Options
	var limit, pull string
	var level slog.Level
	cmd := &cobra.Command{
		Use:   "webhook",
		Short: "Give pods of a cluster their data at admission",
		Long: `Answers a cluster's API servers until SIGTERM: gives pods that carry a label their Datasets, sends pods of
workflows to the nodes that hold their data, and checks Datasets and DataLoads. It makes its certificate by
itself and writes it into the webhook configurations. Any number of replicas may run.

Containers that it adds to pods run the image that --image names, or that its own pod has.`,
		Example: "  stepcache webhook --namespace stepcache-system --image registry.example/stepcache:v1",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := humanize.ParseBytes(limit)
			if err != nil || n > 1<<50 {
				return usage{fmt.Errorf("webhook: --stage-limit %q: want a size such as 10GiB", limit)}
			}
			o.StageLimit = int64(n)
			switch o.PullPolicy = corev1.PullPolicy(pull); o.PullPolicy {
			case "", corev1.PullAlways, corev1.PullIfNotPresent, corev1.PullNever:
			default:
				return usage{fmt.Errorf("webhook: --image-pull-policy %q: want Always, IfNotPresent or Never", pull)}
			}
			for _, name := range o.PullSecrets {
				if len(validation.IsDNS1123Subdomain(name)) > 0 {
					return usage{fmt.Errorf("webhook: --image-pull-secret %q: want the name of a Secret", name)}
				}
			}
			switch {
			case o.Namespace == "":
				return usage{errors.New("webhook: --namespace is missing: name the namespace of this installation, or set POD_NAMESPACE")}
			}
			if err := needImage("webhook", o.Image); err != nil {
				return err
			}
			o.Logger = logger(level)
			ctrl.SetLogger(logr.FromSlogHandler(o.Logger.Handler()))
			klog.SetLogger(logr.FromSlogHandler(o.Logger.Handler()))
			o.SnapshotBytes = keepSnapshots(o.Logger)
			cluster, err := ctrl.GetConfig()
			if err != nil {
				return noCluster("webhook", "$KUBECONFIG", err)
			}
			if o.Image == "" {
				if o.Image, err = ownImage(cmd.Context(), cluster, o.Namespace, "webhook"); err != nil {
					return err
				}
			}
			m, err := webhook.New(cluster, o)
			if err != nil {
				return err
			}
			return m.Start(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Namespace, "namespace", os.Getenv("POD_NAMESPACE"), "namespace of this installation (default $POD_NAMESPACE)")
	f.StringVar(&o.Image, "image", "", "image of the containers that pods are given (default: that of the container webhook of the pod $POD_NAME)")
	f.StringVar(&pull, "image-pull-policy", "", "their pull policy (default: the cluster's)")
	f.StringSliceVar(&o.PullSecrets, "image-pull-secret", nil, "Secret with which their image is pulled, in the pods' namespaces, beside the pods' own (may be repeated)")
	f.StringVar(&limit, "stage-limit", "10GiB", "size up to which the mode stage copies a Dataset whole")
	levelFlag(cmd, &level)
	f.StringVar(&o.Host, "host", "", "address to serve at (default: all)")
	f.IntVar(&o.Port, "port", 9443, "port to serve at")
	f.StringVar(&o.Metrics, "metrics", ":8080", "address of /metrics; 0 for none")
	f.StringVar(&o.Probes, "probes", ":8081", "address of /healthz and /readyz; 0 for none")
	return cmd
}
