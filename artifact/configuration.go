package artifact

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/minio/minio-go/v7/pkg/s3utils"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/cache/source"
)

// configuration is what an artifact's `configuration` says, in YAML. It is plain text in the Workflow, so
// it holds no credentials.
type configuration struct {
	// Dataset names a Dataset with access ReadWrite; the other fields then have defaults.
	Dataset string `json:"dataset,omitempty"`
	// Namespace is the Dataset's. Default: the pod's own.
	Namespace string `json:"namespace,omitempty"`
	// Endpoint is the S3 gateway's URL. Default: that of the Dataset's Service.
	Endpoint string `json:"endpoint,omitempty"`
	// Bucket is the Dataset's name by default.
	Bucket string `json:"bucket,omitempty"`
	// Region signs requests. Default: us-east-1, the gateway's.
	Region string `json:"region,omitempty"`
}

const defaultRegion = "us-east-1"

// parseConfiguration reads and completes it. An error names what is wrong and never shows a value that
// could be a secret.
func parseConfiguration(text, namespace string) (configuration, error) {
	var c configuration
	invalid := func(format string, args ...any) (configuration, error) {
		return configuration{}, fmt.Errorf("configuration of the artifact: "+format, args...)
	}
	var raw map[string]any
	if err := yaml.Unmarshal([]byte(text), &raw); err != nil {
		// The parser's own words may repeat the text.
		return invalid("it is not a YAML mapping; write for example \"dataset: artifacts\"")
	}
	if key := secretIn(raw); key != "" {
		return invalid("%q looks like a credential, and this text is readable by everyone who may see the Workflow: remove it (and replace the key if it was real); the driver reads credentials from the folder $%s or from $%s and $%s",
			key, EnvCredentials, credentialsEnv[0].ID, credentialsEnv[0].Secret)
	}
	for key, value := range raw {
		switch key {
		case "dataset", "namespace", "endpoint", "bucket", "region":
			if _, ok := value.(string); !ok && value != nil {
				return invalid("%s must be a string", key)
			}
		default:
			return invalid("unknown key %q; there are dataset, namespace, endpoint, bucket and region", key)
		}
	}
	if err := yaml.Unmarshal([]byte(text), &c); err != nil {
		return invalid("it is not a YAML mapping of strings")
	}
	for name, value := range map[string]string{"dataset": c.Dataset, "namespace": c.Namespace} {
		if strings.ContainsAny(value, "/.:@ ") || len(value) > 253 {
			return invalid("%s %q is not the name of a Kubernetes object", name, value)
		}
	}
	if c.Dataset == "" && (c.Endpoint == "" || c.Bucket == "") {
		return invalid("say which Dataset keeps the artifacts (dataset: NAME), or endpoint and bucket")
	}
	if c.Namespace == "" {
		c.Namespace = namespace
	}
	if c.Endpoint == "" {
		// Without a namespace the pod's DNS search path completes the name.
		c.Endpoint = "http://" + c.Dataset + "-s3:9000"
		if c.Namespace != "" {
			c.Endpoint = "http://" + c.Dataset + "-s3." + c.Namespace + ".svc:9000"
		}
	}
	if u, err := url.Parse(c.Endpoint); err == nil && u.User != nil {
		return invalid("the endpoint holds credentials; this text is readable by everyone who may see the Workflow: remove them")
	}
	if _, _, err := source.Endpoint(c.Endpoint); err != nil {
		return invalid("%v", err)
	}
	if c.Bucket == "" {
		c.Bucket = c.Dataset
	}
	if err := s3utils.CheckValidBucketNameStrict(c.Bucket); err != nil {
		return invalid("bucket %q: %v", c.Bucket, err)
	}
	if c.Region == "" {
		c.Region = defaultRegion
	}
	return c, nil
}

// secretIn finds the first key, at any depth, that looks like a credential. Argo's own references to
// Secrets (accessKeySecret: {name, key}) are found too: nobody resolves them for a plugin.
func secretIn(v any) string {
	switch v := v.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			plain := strings.ToLower(strings.NewReplacer("-", "", "_", "", ".", "", " ", "").Replace(k))
			for _, word := range []string{"accesskey", "secret", "password", "passwd", "token", "credential", "privatekey", "apikey"} {
				if strings.Contains(plain, word) {
					return k
				}
			}
			if found := secretIn(v[k]); found != "" {
				return found
			}
		}
	case []any:
		for _, e := range v {
			if found := secretIn(e); found != "" {
				return found
			}
		}
	}
	return ""
}

// credentialsDir is the folder with the keys of c: the Dataset's own below dir, or dir itself.
func (c configuration) credentialsDir(dir string) string {
	if dir == "" || c.Dataset == "" {
		return dir
	}
	own := filepath.Join(dir, c.Dataset)
	if info, err := os.Stat(own); err == nil && info.IsDir() {
		return own
	}
	return dir
}

// key checks an artifact's key. It names an object exactly as it is; what a path would make of it (dots,
// nothing between slashes) is refused, since a file cannot have that name.
func checkKey(key string) error {
	trimmed := strings.TrimSuffix(key, "/")
	switch {
	case trimmed == "":
		return errors.New("the artifact has no key; set key, or keyFormat in the artifact repository")
	case len(key) > 1024:
		return fmt.Errorf("the artifact's key has %d bytes, more than the 1024 that a bucket takes", len(key))
	case !cleanName(trimmed):
		return fmt.Errorf("the artifact's key %q has parts that are empty, . or .. : write the key as it is meant", key)
	}
	return nil
}

// cleanName says whether a slash-separated name is one that a file below a folder can have, and only
// that one.
func cleanName(name string) bool {
	if strings.ContainsRune(name, 0) {
		return false
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." {
			return false
		}
	}
	return true
}
