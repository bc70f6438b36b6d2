package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

//go:embed manifests/check.yaml
var checkManifest string

//go:embed manifests/check-workflow.yaml
var checkWorkflow string

// checkNamespace holds what Check makes; it is removed before and after.
const checkNamespace = "cluster-check"

// patience is how long a step of Check may take; most take seconds.
const patience = 3 * time.Minute

// Check proves, with real pods, what the end-to-end tests rely on.
func (c *Cluster) Check(ctx context.Context) (err error) {
	if !c.running("apiserver") {
		return errors.New("the cluster is not up; `cluster up` starts it")
	}
	if err := c.removeCheck(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.removeCheck(context.WithoutCancel(ctx))) }()
	if _, err := c.kubectlWith(ctx, checkManifest, "apply", "-f", "-"); err != nil {
		return err
	}
	for _, s := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"three nodes are ready, each in its zone", c.checkNodes},
		{"a pod runs on every node", c.checkEveryNode},
		{"the API server reaches pods, and logs and exec work", c.checkAPIServerReaches},
		{"Services resolve and answer, also from the pod behind them", c.checkServices},
		{"names of StatefulSet pods resolve to their addresses", c.checkPodNames},
		{"exec-in-lab's network reaches Services by name", c.checkLab},
		{"a native sidecar ends after its step", c.succeeds("sidecar")},
		{"a pod that takes more memory than its limit is OOM killed", c.checkOOM},
		{"a privileged pod mounts FUSE, and another pod sees the mount", c.succeeds("fuse-sees")},
		{"kubelet's plugin folder reaches the node", c.checkPluginFolder},
		{"pod security refuses a privileged pod in a restricted namespace", c.checkPodSecurity},
		{"an Argo workflow succeeds", c.checkArgo},
		{"the bucket answers with what was put, within its limit", c.succeeds("bucket")},
		{"the bucket counts what leaves it", c.checkCounters},
		{"the audit log tells who asked for what", c.checkAudit},
		{"a cut node, a frozen node and a killed node are noticed, and come back", c.checkFailures},
	} {
		if err := s.do(ctx); err != nil {
			return fmt.Errorf("%s: FAILED: %w", s.name, err)
		}
		c.say("ok: %s", s.name)
	}
	return nil
}

func (c *Cluster) removeCheck(ctx context.Context) error {
	_, err := c.kubectl(ctx, "delete", "namespace", checkNamespace, checkNamespace+"-restricted", "--ignore-not-found", "--timeout=180s")
	if err == nil {
		_, err = c.kubectl(ctx, "-n", "argo", "delete", "workflow", "cluster-check", "--ignore-not-found", "--timeout=60s")
	}
	return err
}

// checked is kubectl in the namespace of the check.
func (c *Cluster) checked(ctx context.Context, args ...string) (string, error) {
	return c.kubectl(ctx, append([]string{"-n", checkNamespace}, args...)...)
}

func (c *Cluster) checkNodes(ctx context.Context) error {
	for _, n := range nodes {
		out, err := c.kubectl(ctx, "get", "node", n.name, "-o",
			`jsonpath={.metadata.labels.topology\.kubernetes\.io/zone} {.status.conditions[?(@.type=="Ready")].status}`)
		if err != nil {
			return err
		}
		if out != n.zone+" True" {
			return fmt.Errorf("node %s has zone and readiness %q", n.name, out)
		}
	}
	return nil
}

// podOn is the name of the probe's pod on a node.
func (c *Cluster) podOn(ctx context.Context, node string) (string, error) {
	return c.checked(ctx, "get", "pods", "-l", "app=probe", "--field-selector", "status.phase=Running,spec.nodeName="+node, "-o", "jsonpath={.items[0].metadata.name}")
}

func (c *Cluster) checkEveryNode(ctx context.Context) error {
	if _, err := c.checked(ctx, "rollout", "status", "daemonset/probe", "--timeout=180s"); err != nil {
		return err
	}
	for _, n := range nodes {
		if _, err := c.podOn(ctx, n.name); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) checkAPIServerReaches(ctx context.Context) error {
	pod, err := c.podOn(ctx, "n2")
	if err != nil {
		return err
	}
	err = until(ctx, patience, func(ctx context.Context) error {
		_, err := c.kubectl(ctx, "get", "--raw", "/api/v1/namespaces/"+checkNamespace+"/services/probe:80/proxy/")
		return err
	})
	if err != nil {
		return err
	}
	if out, err := c.checked(ctx, "exec", pod, "--", "/bin/probe", "get", "http://127.0.0.1:8080/"); err != nil || strings.TrimSpace(out) != pod {
		return fmt.Errorf("exec printed %q: %w", out, err)
	}
	_, err = c.checked(ctx, "logs", pod)
	return err
}

// checkServices asks often enough that each pod is chosen, also the asking one itself.
func (c *Cluster) checkServices(ctx context.Context) error {
	for _, n := range nodes {
		pod, err := c.podOn(ctx, n.name)
		if err != nil {
			return err
		}
		seen := map[string]bool{}
		for range 100 {
			out, err := c.checked(ctx, "exec", pod, "--", "/bin/probe", "get", "http://probe/")
			if err != nil {
				return err
			}
			if seen[strings.TrimSpace(out)] = true; len(seen) == len(nodes) {
				break
			}
		}
		if len(seen) != len(nodes) {
			return fmt.Errorf("from %s the Service answers from %d pods of %d", n.name, len(seen), len(nodes))
		}
	}
	return nil
}

func (c *Cluster) checkPodNames(ctx context.Context) error {
	if _, err := c.checked(ctx, "rollout", "status", "statefulset/named", "--timeout=180s"); err != nil {
		return err
	}
	pod, err := c.podOn(ctx, "n3")
	if err != nil {
		return err
	}
	for _, name := range []string{"named-0", "named-1"} {
		want, err := c.checked(ctx, "get", "pod", name, "-o", "jsonpath={.status.podIP}")
		if err != nil {
			return err
		}
		err = until(ctx, patience, func(ctx context.Context) error {
			got, err := c.checked(ctx, "exec", pod, "--", "/bin/probe", "lookup", name+".named")
			if err == nil && strings.TrimSpace(got) != want {
				err = fmt.Errorf("%s.named is %q, not %s", name, got, want)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) checkLab(ctx context.Context) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, program, "exec-in-lab", c.bin("probe"), "get", "http://probe."+checkNamespace+"/").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// succeeds is a check that a pod of check.yaml ends well.
func (c *Cluster) succeeds(pod string) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := c.checked(ctx, "wait", "pod/"+pod, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=180s")
		if err != nil {
			about, _ := c.checked(ctx, "describe", "pod", pod)
			log, _ := c.checked(ctx, "logs", pod, "--all-containers", "--prefix")
			return fmt.Errorf("%w\n%s%s", err, about, log)
		}
		return nil
	}
}

func (c *Cluster) checkOOM(ctx context.Context) error {
	return until(ctx, patience, func(ctx context.Context) error {
		out, err := c.checked(ctx, "get", "pod", "eats", "-o", "jsonpath={.status.containerStatuses[0].state.terminated.reason}")
		if err == nil && out != "OOMKilled" {
			err = fmt.Errorf("its container ended with %q", out)
		}
		return err
	})
}

// checkPluginFolder looks for the socket that a CSI driver would register with.
func (c *Cluster) checkPluginFolder(ctx context.Context) error {
	if err := c.succeeds("registers")(ctx); err != nil {
		return err
	}
	_, err := c.inNode(ctx, "n2", "rm", "/var/lib/kubelet/plugins_registry/cluster-check")
	return err
}

func (c *Cluster) checkPodSecurity(ctx context.Context) error {
	const pod = `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"privileged","namespace":"cluster-check-restricted"},
		"spec":{"containers":[{"name":"c","image":"busybox:1.35","securityContext":{"privileged":true}}]}}`
	out, err := c.kubectlWith(ctx, pod, "create", "-f", "-")
	if err == nil {
		return fmt.Errorf("it was admitted: %s", out)
	}
	if !strings.Contains(err.Error(), "violates PodSecurity") {
		return err
	}
	return nil
}

func (c *Cluster) checkArgo(ctx context.Context) error {
	if _, err := c.kubectlWith(ctx, checkWorkflow, "apply", "-f", "-"); err != nil {
		return err
	}
	err := until(ctx, patience, func(ctx context.Context) error {
		out, err := c.kubectl(ctx, "-n", "argo", "get", "workflow", "cluster-check", "-o", "jsonpath={.status.phase} {.status.message}")
		if err == nil && strings.TrimSpace(out) != "Succeeded" {
			err = fmt.Errorf("the workflow is %q", out)
		}
		return err
	})
	if err != nil {
		pods, _ := c.kubectl(ctx, "-n", "argo", "describe", "pods", "-l", "workflows.argoproj.io/workflow=cluster-check")
		return fmt.Errorf("%w\n%s", err, pods)
	}
	return nil
}

func (c *Cluster) checkCounters(ctx context.Context) error {
	n, err := c.bucketCounters(ctx)
	if err == nil && n.Sent < 64<<20 {
		err = fmt.Errorf("it counts %d bytes sent and %d answers after 64 MiB were read", n.Sent, n.Answers)
	}
	return err
}

func (c *Cluster) checkAudit(context.Context) error {
	var b strings.Builder
	if err := c.Requests(&b); err != nil {
		return err
	}
	for _, who := range []string{"system:node:n1", "system:serviceaccount:argo:argo", "system:kube-scheduler"} {
		if !strings.Contains(b.String(), who) {
			return fmt.Errorf("it has no request of %s", who)
		}
	}
	return nil
}

// checkFailures breaks n3 in each way and mends it.
func (c *Cluster) checkFailures(ctx context.Context) error {
	const node = "n3"
	for _, f := range []struct {
		name       string
		harm, mend func(context.Context, string) error
	}{
		{"cut", c.CutNode, c.JoinNode},
		{"frozen", c.PauseNode, c.ResumeNode},
		{"killed", c.KillNode, c.StartNode},
	} {
		if err := f.harm(ctx, node); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		if err := c.readyIs(ctx, node, "Unknown"); err != nil {
			return fmt.Errorf("%s: %w", f.name, errors.Join(err, f.mend(ctx, node)))
		}
		if err := f.mend(ctx, node); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		if err := c.readyIs(ctx, node, "True"); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		c.say("    %s: noticed and mended", f.name)
	}
	return until(ctx, patience, func(ctx context.Context) error {
		pod, err := c.podOn(ctx, node)
		if err == nil {
			_, err = c.checked(ctx, "exec", pod, "--", "/bin/probe", "get", "http://probe/")
		}
		return err
	})
}

func (c *Cluster) readyIs(ctx context.Context, node, want string) error {
	return until(ctx, patience, func(ctx context.Context) error {
		out, err := c.kubectl(ctx, "get", "node", node, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && out != want {
			err = fmt.Errorf("the condition Ready of node %s is %q, not %s", node, out, want)
		}
		return err
	})
}
