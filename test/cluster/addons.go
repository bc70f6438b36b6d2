package main

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// What runs on the cluster from the start: Argo Workflows in the namespace argo, and a bucket in the
// namespace bucket. Both stay on n1.

var (
	//go:embed manifests/argo
	argoManifests embed.FS
	//go:embed manifests/bucket.yaml
	bucketManifest string
)

// applyAddons writes the objects; their pods start when nodes are ready. It changes nothing where they are
// there already.
func (c *Cluster) applyAddons(ctx context.Context) error {
	// The API server is ready a moment before all its own objects are there.
	err := until(ctx, time.Minute, func(ctx context.Context) error {
		_, err := c.kubectlWith(ctx, bucketManifest, "apply", "--server-side", "--force-conflicts", "-f", "-")
		return err
	})
	if err != nil {
		return fmt.Errorf("install the bucket: %w", err)
	}
	dir, err := c.argoInstallation(ctx)
	if err == nil {
		_, err = c.kubectl(ctx, "apply", "--server-side", "--force-conflicts", "-k", dir)
	}
	if err != nil {
		return fmt.Errorf("install Argo Workflows: %w", err)
	}
	return nil
}

// argoInstallation writes the kustomization beside the module's source, whose manifests it refers to.
func (c *Cluster) argoInstallation(ctx context.Context) (string, error) {
	version, err := moduleVersion(ctx, filepath.Join(c.source, argoFolder), argoModule)
	if err != nil {
		return "", err
	}
	controller, executor := argoImages(version)
	dir := filepath.Join(c.argoSource(), "..", "install")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	const from = "manifests/argo"
	files, err := fs.ReadDir(argoManifests, from)
	if err != nil {
		return "", err
	}
	for _, f := range files {
		text, err := argoManifests.ReadFile(from + "/" + f.Name())
		if err != nil {
			return "", err
		}
		content, err := expand(string(text), map[string]string{"Controller": controller, "Executor": executor})
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(dir, f.Name()), content, 0o644); err != nil {
			return "", err
		}
	}
	return dir, nil
}

func (c *Cluster) addonsReady(ctx context.Context) error {
	for _, d := range []struct{ namespace, name string }{{"bucket", "bucket"}, {"argo", "workflow-controller"}} {
		if _, err := c.kubectl(ctx, "-n", d.namespace, "rollout", "status", "deployment/"+d.name, "--timeout=180s"); err != nil {
			pods, _ := c.kubectl(ctx, "-n", d.namespace, "describe", "pods")
			return fmt.Errorf("%s does not start: %w\n%s", d.name, err, pods)
		}
		c.say("%s ready", d.name)
	}
	// kube-proxy learns of a ready pod a moment later; until then its Service refuses.
	err := until(ctx, time.Minute, func(ctx context.Context) error {
		_, err := c.bucketCounters(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("the Service of the bucket does not answer: %w\n%s", err, c.tail("proxy"))
	}
	return nil
}

// counters are what has left the bucket since it started.
type counters struct {
	Sent    int64 `json:"sent"`
	Answers int64 `json:"answers"`
}

// BucketCounters prints what has left the bucket.
func (c *Cluster) BucketCounters(ctx context.Context, w io.Writer) error {
	n, err := c.bucketCounters(ctx)
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(n)
}

func (c *Cluster) bucketCounters(ctx context.Context) (counters, error) {
	var n counters
	ip, err := c.kubectl(ctx, "-n", "bucket", "get", "service", "bucket", "-o", "jsonpath={.spec.clusterIP}")
	if err != nil {
		return n, err
	}
	body, err := c.get(ctx, "http://"+net.JoinHostPort(ip, "9002")+"/")
	if err != nil {
		return n, err
	}
	return n, json.Unmarshal(body, &n)
}

// get reads an URL in the cluster's network.
func (c *Cluster) get(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			var conn net.Conn
			err := c.inNetwork(c.name, func() (err error) {
				conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
				return err
			})
			return conn, err
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(resp.Body)
	err = errors.Join(err, resp.Body.Close())
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answers %s", url, resp.Status)
	}
	return body, err
}
