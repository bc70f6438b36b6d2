package manifest

import (
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// ErrNoSecret: neither the manifests nor the environment hold the Secret that a mount names.
var ErrNoSecret = errors.New("secret not found")

// secret takes in a Secret. It is read by hand rather than by a decoder, whose errors may quote values.
func (r *reader) secret(at place, u map[string]any) {
	id, ok := r.identify(at, "Secret", u)
	if !ok {
		return
	}
	failed := false
	fail := func(path *field.Path, detail string) {
		failed = true
		r.fail(at.error(id.String(), &field.Error{Type: field.ErrorTypeForbidden, Field: path.String(), Detail: detail}))
	}
	for _, name := range slices.Sorted(maps.Keys(u)) {
		if !slices.Contains([]string{"apiVersion", "kind", "metadata", "type", "immutable", "data", "stringData"}, name) {
			fail(field.NewPath(name), "there is no such field; remove it, or put it under stringData")
		}
	}
	for _, msg := range validation.IsDNS1123Subdomain(id.name) {
		fail(field.NewPath("metadata", "name"), msg)
	}
	for _, msg := range validation.IsDNS1123Label(id.namespace) {
		fail(field.NewPath("metadata", "namespace"), msg)
	}
	s := &corev1.Secret{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Namespace: id.namespace, Name: id.name},
		Data:       map[string][]byte{},
	}
	if t, ok := u["type"].(string); ok {
		s.Type = corev1.SecretType(t)
	}
	// stringData comes second, since it replaces a key of data, as in an API server.
	for _, part := range []string{"data", "stringData"} {
		if u[part] == nil {
			continue
		}
		values, ok := u[part].(map[string]any)
		if !ok {
			fail(field.NewPath(part), "must be a map from key to value")
			continue
		}
		for _, key := range slices.Sorted(maps.Keys(values)) {
			path := field.NewPath(part).Key(key)
			for _, msg := range validation.IsConfigMapKey(key) {
				fail(path, msg)
			}
			value, ok := values[key].(string)
			switch {
			case !ok && values[key] != nil:
				fail(path, "must be text; put it in quotes")
			case part == "stringData":
				s.Data[key] = []byte(value)
			default:
				b, err := base64.StdEncoding.DecodeString(strings.NewReplacer("\n", "", "\r", "").Replace(value))
				if err != nil {
					fail(path, "is not base64; put plain text under stringData instead")
				}
				s.Data[key] = b
			}
		}
	}
	if !failed {
		r.set.Secrets = append(r.set.Secrets, s)
	}
}

// EnvName is the environment variable that stands for a key of a Secret where the manifests hold no
// Secret of that name: STEPCACHE_SECRET_<NAME>_<KEY>, upper-case, every other character an underscore.
// The namespace is not part of it.
func EnvName(secret, key string) string {
	return "STEPCACHE_SECRET_" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z' || r >= '0' && r <= '9':
			return r
		default:
			return '_'
		}
	}, secret+"_"+key)
}

// Credentials returns the files of the Secret that a mount of the Dataset names, as a worker would see
// them mounted: the keys that CredentialsRef.Map names and ca.crt, and no others of the Secret. It is nil without
// an error for a mount that names none. An error that is ErrNoSecret leaves the caller the choice of the
// source's own environment (AWS_ACCESS_KEY_ID and the like).
func (s *Set) Credentials(d *v1alpha1.Dataset, m *v1alpha1.Mount) (map[string][]byte, error) {
	return s.credentials(d, m, os.LookupEnv)
}

func (s *Set) credentials(d *v1alpha1.Dataset, m *v1alpha1.Mount, env func(string) (string, bool)) (map[string][]byte, error) {
	ref := m.CredentialsSecretRef
	if ref == nil {
		return nil, nil
	}
	get := func(key string) ([]byte, bool) {
		v, ok := env(EnvName(ref.Name, key))
		return []byte(v), ok
	}
	from := "environment"
	if i := slices.IndexFunc(s.Secrets, func(s *corev1.Secret) bool {
		return s.Namespace == d.Namespace && s.Name == ref.Name
	}); i >= 0 {
		from = "manifests"
		get = func(key string) ([]byte, bool) {
			v, ok := s.Secrets[i].Data[key]
			return v, ok
		}
	}
	files := map[string][]byte{}
	keys := ref.Map()
	var missing []string
	for _, name := range []string{"accessKeyID", "accessKeySecret", "sessionToken"} {
		v, ok := get(keys[name])
		// An editor or `echo | base64` leaves a line end, which no key has.
		v = []byte(strings.TrimRight(string(v), "\r\n"))
		switch {
		case ok && len(v) > 0:
			files[keys[name]] = v
		case name != "sessionToken":
			missing = append(missing, keys[name])
		}
	}
	if v, ok := get("ca.crt"); ok {
		files["ca.crt"] = v
	}
	if len(missing) == 0 {
		return files, nil
	}
	if from == "manifests" {
		return nil, fmt.Errorf("dataset %s/%s: secret %q has no value for key %s; add it or set credentialsSecretRef.keys",
			d.Namespace, d.Name, ref.Name, strings.Join(missing, " and "))
	}
	if len(files) > 0 {
		return nil, fmt.Errorf("dataset %s/%s: secret %q is only partly in the environment; set %s too",
			d.Namespace, d.Name, ref.Name, envNames(ref.Name, missing))
	}
	return nil, fmt.Errorf("dataset %s/%s: %w: put Secret %q of namespace %s beside the Dataset, or set %s",
		d.Namespace, d.Name, ErrNoSecret, ref.Name, d.Namespace, envNames(ref.Name, missing))
}

func envNames(secret string, keys []string) string {
	names := make([]string, len(keys))
	for i, key := range keys {
		names[i] = EnvName(secret, key)
	}
	return strings.Join(names, " and ")
}
