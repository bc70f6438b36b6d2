package main

import (
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/artifact"
)

// artifactMemory is what the heap is kept below where GOMEMLIMIT says nothing: the driver shares pods whose
// containers have 256 MiB.
const artifactMemory = 192 << 20

func artifactCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "artifact SOCKET",
		Short: "Load and save the artifacts of Argo Workflows v4, as its driver plugin",
		Long: `Answers argoexec on a Unix socket until SIGTERM, and then ends with status 0. Argo starts it, with the socket's
path as the one argument, beside each step whose artifacts it keeps: name it in the workflow controller's
ConfigMap, under artifactDrivers (examples/artifacts shows how).

An artifact's configuration is YAML that everyone may see:

  dataset: artifacts          # a Dataset with access: ReadWrite; or endpoint: and bucket:
  namespace: argo             # the Dataset's; default: the pod's own
  endpoint: http://...        # default: http://DATASET-s3.NAMESPACE.svc:9000
  bucket: artifacts           # default: the Dataset's name
  region: us-east-1

The rest comes from the environment (executor.env in Argo's ConfigMap reaches it):

  STEPCACHE_S3_ACCESS_KEY_ID, STEPCACHE_S3_SECRET_ACCESS_KEY   keys (or the AWS variables)
  STEPCACHE_S3_CREDENTIALS    folder of the mounted Secret DATASET-s3, or of one such folder for each Dataset
  STEPCACHE_NODE_ADDRESS      host:port or unix:///path of a gateway on this node, used where it answers
  POD_NAMESPACE               the pod's namespace`,
		Example: "  stepcache artifact /tmp/artifact-plugins/stepcache/socket",
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			if os.Getenv("GOMEMLIMIT") == "" {
				debug.SetMemoryLimit(artifactMemory)
			}
			// What it loads belongs to the step, which may run as another user.
			unix.Umask(0)
			return artifact.New(artifact.Options{
				CredentialsDir: os.Getenv(artifact.EnvCredentials),
				Namespace:      os.Getenv("POD_NAMESPACE"),
				NodeAddress:    os.Getenv("STEPCACHE_NODE_ADDRESS"),
				Logger:         logger(slog.LevelInfo),
			}).Serve(cmd.Context(), given[0])
		},
	}
}
