package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/controllers"
	"github.com/stepcache/stepcache/controllers/uninstall"
)

func uninstallCommand() *cobra.Command {
	var o uninstall.Options
	var kubeconfig, kubecontext string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take an installation off a cluster, with all its Datasets",
		Long: `Removes everything that "kubectl apply -k config/default" and the Datasets brought, in the order in which nothing is
left behind: DataLoads and Datasets of all namespaces, then the webhooks, the node service, the controller, their
rights, the definitions and the namespace; labels of nodes and namespaces and Secrets in other namespaces too. What
a bucket holds is not touched.

It waits for the pods that use a Dataset and names them: without the node service they could not end. End them, or
have them deleted with --delete-pods. Those that a Deployment, StatefulSet or the like would make anew are left: it
names that, to be scaled to 0 or deleted. There is no --force that goes on without them, since they would be left
Terminating for ever.

It can be stopped and run again at any point. Where the controller does not run, its part is done from here.`,
		Example: `  stepcache uninstall --dry-run
  stepcache uninstall --delete-pods --timeout 10m`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			rules := clientcmd.NewDefaultClientConfigLoadingRules()
			rules.ExplicitPath = kubeconfig
			cluster, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: kubecontext}).ClientConfig()
			if err != nil {
				return noCluster("uninstall", "--kubeconfig or $KUBECONFIG", err)
			}
			cluster.QPS, cluster.Burst = 50, 100
			c, err := client.New(cluster, client.Options{Scheme: controllers.Scheme()})
			if err != nil {
				return fmt.Errorf("uninstall: %w", err)
			}
			ctx := cmd.Context()
			if timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, timeout)
				defer cancel()
			}
			o.Out = cmd.OutOrStdout()
			return uninstall.Run(ctx, c, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Namespace, "namespace", "stepcache-system", "namespace of the installation")
	f.BoolVar(&o.DryRun, "dry-run", false, "say what would be done, and which pods are in the way")
	f.BoolVar(&o.DeletePods, "delete-pods", false, "delete the pods that use a Dataset instead of waiting for them, but for those that would be made anew")
	f.DurationVar(&timeout, "timeout", 0, "give up waiting after this long; 0 waits for ever")
	f.StringVar(&kubeconfig, "kubeconfig", "", "how to reach the cluster (default $KUBECONFIG, ~/.kube/config, or as a pod does)")
	f.StringVar(&kubecontext, "context", "", "context of the kubeconfig")
	return cmd
}
