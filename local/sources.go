package local

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/stepcache/stepcache/api/manifest"
	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/tier"
)

// configure lays the Secrets of a Dataset out below dir, as a kubelet mounts them, and returns what its
// workers need to know of it.
func configure(set *manifest.Set, d *v1alpha1.Dataset, dir string) (worker.Config, error) {
	for i := range d.Spec.Mounts {
		m := &d.Spec.Mounts[i]
		if m.Scheme() == v1alpha1.SchemeDataset {
			return worker.Config{}, fmt.Errorf("dataset %s/%s: %s: another Dataset as a source is for clusters; mount its bucket here", d.Namespace, d.Name, m.Source)
		}
		files, err := set.Credentials(d, m)
		if err != nil {
			return worker.Config{}, err
		}
		if files == nil {
			continue // none named: the source takes the environment's own (AWS_ACCESS_KEY_ID and the like)
		}
		secret := filepath.Join(dir, m.CredentialsSecretRef.Name)
		if err := os.MkdirAll(secret, 0o700); err != nil {
			return worker.Config{}, err
		}
		for key, value := range files {
			if err := os.WriteFile(filepath.Join(secret, key), value, 0o600); err != nil {
				return worker.Config{}, err
			}
		}
	}
	return tier.WorkerConfig(d, func(name string) string { return filepath.Join(dir, name) })
}

// Sources says how to reach the buckets of one Dataset of the manifests (namespace/name), by the path of
// the mount. remove deletes the credentials' files that it made.
func Sources(set *manifest.Set, dataset string) (configs map[string]source.Config, remove func(), err error) {
	for _, d := range set.Datasets {
		if name(d) != dataset {
			continue
		}
		dir, err := os.MkdirTemp("", "stepcache-secrets-")
		if err != nil {
			return nil, nil, err
		}
		remove = func() { _ = os.RemoveAll(dir) }
		c, err := configure(set, d, dir)
		if err != nil {
			remove()
			return nil, nil, err
		}
		configs = map[string]source.Config{}
		for _, m := range c.Mounts {
			configs[m.Path] = m.Config
		}
		return configs, remove, nil
	}
	return nil, nil, fmt.Errorf("the manifests have no Dataset %s, which the tier serves", dataset)
}
