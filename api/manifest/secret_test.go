package manifest

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const withSecret = `apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: genomes, namespace: argo}
spec:
  mounts: [{source: "s3://bucket/", credentialsSecretRef: {name: access-key.1}}]
  workers: {memory: 64Mi}
---
`

func secretOf(more string) string {
	return "apiVersion: v1\nkind: Secret\nmetadata: {name: access-key.1, namespace: argo}\n" + more + "\n"
}

func TestSecretSources(t *testing.T) {
	env := map[string]string{}
	for _, c := range []struct {
		name, dataset, secret string
		env                   map[string]string
		files                 map[string]string
		want                  string
	}{
		{name: "text", secret: secretOf("stringData: {accessKeyID: id, accessKeySecret: sec, other: x}"),
			files: map[string]string{"accessKeyID": "id", "accessKeySecret": "sec"}},
		{name: "base64, with a token", secret: secretOf("data: {accessKeyID: aWQ=, accessKeySecret: c2Vj, sessionToken: dG9r}"),
			files: map[string]string{"accessKeyID": "id", "accessKeySecret": "sec", "sessionToken": "tok"}},
		{name: "base64 over lines", secret: secretOf("data:\n  accessKeyID: |\n    aW\n    Q=\n  accessKeySecret: c2Vj"),
			files: map[string]string{"accessKeyID": "id", "accessKeySecret": "sec"}},
		{name: "text replaces base64", secret: secretOf("data: {accessKeyID: aWQ=, accessKeySecret: c2Vj}\nstringData: {accessKeyID: new}"),
			files: map[string]string{"accessKeyID": "new", "accessKeySecret": "sec"}},
		{name: "line end", secret: secretOf("data: {accessKeyID: aWQK, accessKeySecret: c2VjCg==}"),
			files: map[string]string{"accessKeyID": "id", "accessKeySecret": "sec"}},
		{name: "with an authority", secret: secretOf("stringData: {accessKeyID: id, accessKeySecret: sec, ca.crt: \"pem\\n\"}"),
			files: map[string]string{"accessKeyID": "id", "accessKeySecret": "sec", "ca.crt": "pem\n"}},
		{name: "authority of the environment", env: map[string]string{"STEPCACHE_SECRET_ACCESS_KEY_1_ACCESSKEYID": "id",
			"STEPCACHE_SECRET_ACCESS_KEY_1_ACCESSKEYSECRET": "sec", "STEPCACHE_SECRET_ACCESS_KEY_1_CA_CRT": "pem"},
			files: map[string]string{"accessKeyID": "id", "accessKeySecret": "sec", "ca.crt": "pem"}},
		{name: "mapped keys", dataset: strings.Replace(withSecret, "access-key.1}", "access-key.1, keys: {accessKeyID: AK, accessKeySecret: SK}}", 1),
			secret: secretOf("stringData: {AK: id, SK: sec, accessKeyID: other}"),
			files:  map[string]string{"AK": "id", "SK": "sec"}},
		{name: "environment", env: map[string]string{"STEPCACHE_SECRET_ACCESS_KEY_1_ACCESSKEYID": "id", "STEPCACHE_SECRET_ACCESS_KEY_1_ACCESSKEYSECRET": "sec\n"},
			files: map[string]string{"accessKeyID": "id", "accessKeySecret": "sec"}},
		{name: "manifests before environment", secret: secretOf("stringData: {accessKeyID: id, accessKeySecret: sec}"),
			env:   map[string]string{"STEPCACHE_SECRET_ACCESS_KEY_1_ACCESSKEYID": "no", "STEPCACHE_SECRET_ACCESS_KEY_1_ACCESSKEYSECRET": "no"},
			files: map[string]string{"accessKeyID": "id", "accessKeySecret": "sec"}},
		{name: "nowhere", want: `put Secret "access-key.1" of namespace argo beside the Dataset, or set STEPCACHE_SECRET_ACCESS_KEY_1_ACCESSKEYID and STEPCACHE_SECRET_ACCESS_KEY_1_ACCESSKEYSECRET`},
		{name: "half in the environment", env: map[string]string{"STEPCACHE_SECRET_ACCESS_KEY_1_ACCESSKEYID": "id"}, want: "only partly in the environment; set STEPCACHE_SECRET_ACCESS_KEY_1_ACCESSKEYSECRET too"},
		{name: "key missing", secret: secretOf("stringData: {accessKeyID: id}"), want: `dataset argo/genomes: secret "access-key.1" has no value for key accessKeySecret; add it or set credentialsSecretRef.keys`},
		{name: "key empty", secret: secretOf("stringData: {accessKeyID: id, accessKeySecret: }"), want: "has no value for key accessKeySecret"},
		{name: "other namespace", secret: strings.Replace(secretOf("stringData: {accessKeyID: id, accessKeySecret: sec}"), "namespace: argo", "namespace: other", 1), want: "secret not found"},
	} {
		t.Run(c.name, func(t *testing.T) {
			manifest := c.dataset
			if manifest == "" {
				manifest = withSecret
			}
			s, err := Parse("m.yaml", []byte(manifest+c.secret))
			if err != nil {
				t.Fatal(err)
			}
			env = c.env
			files, err := s.credentials(s.Datasets[0], &s.Datasets[0].Spec.Mounts[0], func(name string) (string, bool) {
				v, ok := env[name]
				return v, ok
			})
			if c.want != "" {
				refused(t, err, c.want)
				if got := errors.Is(err, ErrNoSecret); got != strings.Contains(err.Error(), "secret not found") {
					t.Errorf("ErrNoSecret: %v of %v", got, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for k, v := range files {
				got[k] = string(v)
			}
			if diff := cmp.Diff(c.files, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	s, err := Parse("m.yaml", []byte(dataset))
	if err != nil {
		t.Fatal(err)
	}
	if files, err := s.Credentials(s.Datasets[0], &s.Datasets[0].Spec.Mounts[0]); files != nil || err != nil {
		t.Errorf("a mount that names no Secret has %v, %v", files, err)
	}
}

func TestBadSecretsAreRefusedWithoutTheirValues(t *testing.T) {
	const value = "hunter2hunter2"
	for name, c := range map[string]struct{ secret, want string }{
		"not base64":      {secretOf("data: {accessKeyID: " + value + "*}"), "data[accessKeyID]: is not base64; put plain text under stringData"},
		"number":          {secretOf("stringData: {accessKeyID: 12345678, x: " + value + "}"), "stringData[accessKeyID]: must be text; put it in quotes"},
		"map":             {secretOf("stringData: {accessKeyID: {a: " + value + "}}"), "must be text"},
		"list":            {secretOf("stringData: [" + value + "]"), "stringData: must be a map"},
		"text":            {secretOf("data: " + value), "data: must be a map"},
		"at the top":      {secretOf("accessKeyID: " + value), "accessKeyID: there is no such field; remove it, or put it under stringData"},
		"bad key":         {secretOf("stringData: {a/b: " + value + "}"), "stringData[a/b]"},
		"bad name":        {strings.Replace(secretOf("stringData: {a: "+value+"}"), "access-key.1", "A_b", 1), "metadata.name"},
		"bad namespace":   {strings.Replace(secretOf("stringData: {a: "+value+"}"), "argo", "a.b", 1), "metadata.namespace"},
		"no name":         {"apiVersion: v1\nkind: Secret\nstringData: {a: " + value + "}\n", "metadata.name is missing"},
		"twice":           {secretOf("stringData: {a: "+value+"}") + "---\n" + secretOf("stringData: {a: "+value+"}"), "there already is one"},
		"key twice":       {secretOf("stringData: {a: " + value + ", a: " + value + "}"), `key "a" already set`},
		"in a list twice": {"apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Secret, metadata: {name: a}, stringData: {a: " + value + "}}\n- {apiVersion: v1, kind: Secret, metadata: {name: a}}\n", "there already is one"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("m.yaml", []byte(c.secret))
			refused(t, err, c.want)
			if err != nil && strings.Contains(err.Error(), value) {
				t.Errorf("the error has the value: %v", err)
			}
		})
	}
}
