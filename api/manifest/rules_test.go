package manifest

import (
	"fmt"
	"strings"
	"testing"
)

// A rule of the objects: spec is all of a Dataset's or a DataLoad's; want is a part of the error, empty
// for one that is accepted.
type rule struct{ name, spec, want string }

const (
	mounts  = `mounts: [{source: "s3://bucket/"}]`
	workers = `workers: {memory: 64Mi}`
)

func mount(fields string) string { return "{mounts: [{" + fields + "}], " + workers + "}" }

func with(fields string) string { return "{" + mounts + ", " + workers + ", " + fields + "}" }

func withWorkers(fields string) string { return "{" + mounts + ", workers: {" + fields + "}}" }

func paths(paths ...string) string {
	var m []string
	for _, p := range paths {
		m = append(m, fmt.Sprintf("{source: 's3://bucket', path: '%s'}", p))
	}
	return "{mounts: [" + strings.Join(m, ", ") + "], " + workers + "}"
}

var datasetRules = []rule{
	{"least", "{" + mounts + ", " + workers + "}", ""},

	{"source s3 bucket", mount(`source: "s3://bucket"`), ""},
	{"source s3 prefix", mount(`source: "s3://my.bucket_1/a/b c/%20?x#y/"`), ""},
	{"source oss", mount(`source: "oss://bucket/", region: cn-shanghai`), ""},
	{"source dataset", mount(`source: "dataset://ns/name"`), ""},
	{"source dataset folder", mount(`source: "dataset://ns/name/a/b/"`), ""},
	{"source file", mount(`source: "file:///data/x y"`), ""},
	{"source missing", mount(`path: /`), "spec.mounts[0].source is missing"},
	{"source empty", mount(`source: ""`), "spec.mounts[0].source"},
	{"source unknown scheme", mount(`source: "http://bucket/"`), "source must begin with s3://, oss:// or dataset://"},
	{"source no scheme", mount(`source: "bucket/x"`), "source must begin with"},
	{"source one slash", mount(`source: "s3:/bucket/x"`), "source must begin with"},
	{"source upper-case scheme", mount(`source: "S3://bucket/x"`), "source must begin with"},
	{"source no bucket", mount(`source: "s3:///x"`), "an S3 source is s3://bucket/prefix/"},
	{"source short bucket", mount(`source: "s3://ab/x"`), "an S3 source is"},
	{"source long bucket", mount(`source: "s3://` + strings.Repeat("a", 64) + `/x"`), "an S3 source is"},
	{"source credentials", mount(`source: "s3://AK:SK@bucket/x"`), "credentials and the endpoint's host do not belong in it"},
	{"source host and port", mount(`source: "s3://localhost:9000/bucket/x"`), "an S3 source is"},
	{"source query without prefix", mount(`source: "s3://bucket?x"`), "an S3 source is"},
	{"source oss upper-case", mount(`source: "oss://Bucket/x", region: cn-shanghai`), "an OSS source is"},
	{"source oss dot", mount(`source: "oss://bu.cket/x", region: cn-shanghai`), "an OSS source is"},
	{"source dataset without name", mount(`source: "dataset://ns"`), "a source in another Dataset is"},
	{"source dataset bad name", mount(`source: "dataset://ns/Name"`), "a source in another Dataset is"},
	{"source dataset empty folder", mount(`source: "dataset://ns/name//x"`), "a source in another Dataset is"},
	{"source dataset dots", mount(`source: "dataset://ns/name/../x"`), "must not have . or .. in it"},
	{"source file relative", mount(`source: "file://data"`), "a local source is"},
	{"source file dots", mount(`source: "file:///data/.."`), "must not have . or .. in it"},
	{"source control character", mount(`source: "s3://bucket/a\tb"`), "control characters"},
	{"source long", mount(`source: "s3://bucket/` + strings.Repeat("a", 1100) + `"`), "spec.mounts[0].source: Too long"},

	{"path nested", paths("/a/b.c/d e"), ""},
	{"path dots in a name", paths("/a..b/.hidden"), ""},
	{"path siblings", paths("/a", "/ab", "/b/c", "/b/d"), ""},
	{"path relative", paths("a"), "path must be / or begin with /"},
	{"path empty", paths(""), "path must be / or begin with /"},
	{"path slash at the end", paths("/a/"), "path must be / or begin with /"},
	{"path empty folder", paths("/a//b"), "path must be / or begin with /"},
	{"path parent", paths("/a/../b"), "path must not have . or .. in it"},
	{"path dot", paths("/a/."), "path must not have . or .. in it"},
	{"path control character", mount(`source: "s3://bucket", path: "/a\nb"`), "path must be / or begin with /"},
	{"path long", paths("/" + strings.Repeat("a", 255)), "Too long"},
	{"paths equal", paths("/a", "/a"), `spec.mounts[1]: {"path":"/a"} is there twice`},
	{"paths both default", "{mounts: [{source: 's3://bucket'}, {source: 's3://other'}], " + workers + "}", "is there twice"},
	{"paths one below", paths("/a", "/a/b"), "the paths of mounts must not overlap"},
	{"paths one above", paths("/a/b/c", "/a"), "the paths of mounts must not overlap"},
	{"paths root and other", paths("/", "/a"), "the paths of mounts must not overlap"},
	{"no mounts", "{mounts: [], " + workers + "}", "spec.mounts"},
	{"mounts missing", "{" + workers + "}", "spec.mounts is missing"},
	{"too many mounts", paths(strings.Split(strings.TrimSuffix(strings.Repeat("/a,", 33), ","), ",")...), "spec.mounts: Too many"},

	{"endpoint", mount(`source: "s3://bucket", endpoint: "minio.example.com:9000"`), ""},
	{"endpoint plain", mount(`source: "s3://bucket", endpoint: "http://10.0.0.1:9000"`), ""},
	{"endpoint IPv6", mount(`source: "s3://bucket", endpoint: "http://[::1]:9000"`), ""},
	{"endpoint of the last port", mount(`source: "s3://bucket", endpoint: "host:65535"`), ""},
	{"endpoint above the last port", mount(`source: "s3://bucket", endpoint: "host:65536"`), "with a port of 1 to 65535"},
	{"endpoint of port 0", mount(`source: "s3://bucket", endpoint: "http://host:0"`), "with a port of 1 to 65535"},
	{"endpoint slash", mount(`source: "s3://bucket", endpoint: "http://host:9000/"`), ""},
	{"endpoint path", mount(`source: "s3://bucket", endpoint: "http://host/path"`), "endpoint must be host or host:port with a port of 1 to 65535"},
	{"endpoint other scheme", mount(`source: "s3://bucket", endpoint: "ftp://host"`), "endpoint must be host or host:port with a port of 1 to 65535"},
	{"endpoint credentials", mount(`source: "s3://bucket", endpoint: "http://a:b@host"`), "endpoint must be host or host:port with a port of 1 to 65535"},
	{"endpoint empty", mount(`source: "s3://bucket", endpoint: ""`), "endpoint must be host or host:port with a port of 1 to 65535"},
	{"endpoint space", mount(`source: "s3://bucket", endpoint: "a b"`), "endpoint must be host or host:port with a port of 1 to 65535"},
	{"addressing style", mount(`source: "s3://bucket", endpoint: tos-s3-cn-beijing.volces.com, addressingStyle: Virtual`), ""},
	{"addressing style of Amazon", mount(`source: "s3://bucket", addressingStyle: Path`), ""},
	{"addressing style automatic at an address", mount(`source: "s3://bucket", endpoint: "http://127.0.0.1:9000", addressingStyle: Auto`), ""},
	{"addressing style virtual at a name with digits", mount(`source: "s3://bucket", endpoint: "http://10.example:9000", addressingStyle: Virtual`), ""},
	{"addressing style virtual at an address", mount(`source: "s3://bucket", endpoint: "http://127.0.0.1:9000", addressingStyle: Virtual`), "this endpoint is an address"},
	{"addressing style virtual at an address alone", mount(`source: "s3://bucket", endpoint: 127.0.0.1, addressingStyle: Virtual`), "this endpoint is an address"},
	{"addressing style virtual at an address of IPv6", mount(`source: "s3://bucket", endpoint: "https://[fd00::1]", addressingStyle: Virtual`), "this endpoint is an address"},
	{"addressing style of OSS", mount(`source: "oss://bucket", region: cn-beijing, addressingStyle: Path`), "addressingStyle is for s3:// sources"},
	{"addressing style of a file", mount(`source: "file:///x", addressingStyle: Auto`), "addressingStyle is for s3:// sources"},
	{"addressing style unknown", mount(`source: "s3://bucket", addressingStyle: virtual`), "Virtual"},
	{"region bad", mount(`source: "s3://bucket", region: "us east"`), "region must be a name"},
	{"oss without endpoint and region", mount(`source: "oss://bucket"`), "needs an endpoint or a region"},
	{"oss known endpoint", mount(`source: "oss://bucket", endpoint: "https://oss-cn-beijing.aliyuncs.com"`), ""},
	{"oss endpoint and region agree", mount(`source: "oss://bucket", endpoint: oss-cn-beijing-internal.aliyuncs.com, region: cn-beijing`), ""},
	{"oss unknown endpoint", mount(`source: "oss://bucket", endpoint: "127.0.0.1:9000"`), "the region cannot be told from this endpoint"},
	{"oss unknown endpoint with region", mount(`source: "oss://bucket", endpoint: "127.0.0.1:9000", region: cn-beijing`), ""},
	{"oss accelerated endpoint", mount(`source: "oss://bucket", endpoint: oss-accelerate.aliyuncs.com`), "the region cannot be told from this endpoint"},
	{"oss accelerated endpoint with region", mount(`source: "oss://bucket", endpoint: oss-accelerate.aliyuncs.com, region: cn-beijing`), ""},
	{"oss region of an endpoint", mount(`source: "oss://bucket", region: oss-cn-beijing`), "written without oss- and -internal"},
	{"oss region internal", mount(`source: "oss://bucket", region: cn-beijing-internal`), "written without oss- and -internal"},
	{"oss regions differ", mount(`source: "oss://bucket", endpoint: oss-cn-beijing.aliyuncs.com, region: cn-shanghai`), "the endpoint is of another region"},
	{"endpoint of a file", mount(`source: "file:///x", endpoint: host`), "are for s3:// and oss:// sources"},
	{"region of a dataset", mount(`source: "dataset://a/b", region: x`), "are for s3:// and oss:// sources"},
	{"secret of a file", mount(`source: "file:///x", credentialsSecretRef: {name: a}`), "are for s3:// and oss:// sources"},
	{"unversioned file", mount(`source: "file:///x", allowUnversioned: true`), "are for s3:// and oss:// sources"},
	{"unversioned bucket", mount(`source: "s3://bucket", allowUnversioned: true`), ""},

	{"secret", mount(`source: "s3://bucket", credentialsSecretRef: {name: access-key}`), ""},
	{"secret keys", mount(`source: "s3://bucket", credentialsSecretRef: {name: a.b, keys: {accessKeyID: fs.oss.accessKeyId, accessKeySecret: _x}}`), ""},
	{"secret without name", mount(`source: "s3://bucket", credentialsSecretRef: {}`), "credentialsSecretRef.name is missing"},
	{"secret empty name", mount(`source: "s3://bucket", credentialsSecretRef: {name: ""}`), "must be the name of a Secret"},
	{"secret bad name", mount(`source: "s3://bucket", credentialsSecretRef: {name: ns/a}`), "must be the name of a Secret"},
	{"secret bad key", mount(`source: "s3://bucket", credentialsSecretRef: {name: a, keys: {accessKeyID: "a/b"}}`), "must be a key of a Secret"},
	{"secret key above", mount(`source: "s3://bucket", credentialsSecretRef: {name: a, keys: {accessKeyID: ".."}}`), "must be a key of a Secret"},
	{"anonymous", mount(`source: "s3://bucket", anonymous: true`), ""},
	{"anonymous with secret", mount(`source: "s3://bucket", anonymous: true, credentialsSecretRef: {name: a}`), "set at most one of"},
	{"anonymous and ambient", mount(`source: "s3://bucket", anonymous: true, ambient: true`), "set at most one of"},
	{"anonymous text", mount(`source: "s3://bucket", anonymous: "true"`), "must be true or false"},
	{"ambient without account", mount(`source: "s3://bucket", ambient: true`), "needs workers.template.spec.serviceAccountName"},
	{"ambient with empty template", "{mounts: [{source: 's3://bucket', ambient: true}], workers: {memory: 64Mi, template: {}}}", "needs workers.template.spec.serviceAccountName"},
	{"ambient with account", "{mounts: [{source: 's3://bucket', ambient: true}], workers: {memory: 64Mi, template: {spec: {serviceAccountName: reader}}}}", ""},

	{"workers missing", "{" + mounts + "}", "spec.workers is missing"},
	{"memory missing", withWorkers("replicas: 1"), "spec.workers.memory is missing"},
	{"memory Gi", withWorkers("memory: 12Gi"), ""},
	{"memory decimal", withWorkers("memory: 1.5Gi"), ""},
	{"memory number", withWorkers("memory: 67108864"), ""},
	{"memory least", withWorkers("memory: 16Mi"), ""},
	{"memory zero", withWorkers("memory: 0"), "memory of a worker must be at least 16Mi"},
	{"memory zero Gi", withWorkers("memory: 0Gi"), "memory of a worker must be at least 16Mi"},
	{"memory negative", withWorkers("memory: -1Gi"), "memory of a worker must be at least 16Mi"},
	{"memory too small", withWorkers("memory: 16M"), "memory of a worker must be at least 16Mi"},
	{"memory milli", withWorkers("memory: 999m"), "memory of a worker must be at least 16Mi"},
	{"memory too large", withWorkers("memory: 65Ti"), "must be at most 64Ti"},
	{"memory very large", withWorkers("memory: 1e400"), "spec.workers.memory"},
	{"memory exponent that Go does not read", withWorkers("memory: '1e1.5'"), "spec.workers.memory: \"1e1.5\": must be a quantity such as 12Gi"},
	{"memory that takes for ever to compare", withWorkers("memory: '1e400000000'"), "must be a quantity such as 12Gi"},
	{"memory exponent", withWorkers("memory: '1e+10'"), ""},
	{"memory exa", withWorkers("memory: 1E"), "must be at most 64Ti"},
	{"memory exbi", withWorkers("memory: 1Ei"), "must be at most 64Ti"},
	{"memory long", withWorkers("memory: '0" + strings.Repeat("0", 32) + "64Mi'"), "of at most 32 digits"},
	{"memory GB", withWorkers("memory: 12GB"), `"12GB": must be a quantity such as 12Gi`},
	{"memory empty", withWorkers(`memory: ""`), "must be a quantity such as 12Gi"},
	{"memory list", withWorkers("memory: [1]"), "must be a quantity such as 12Gi"},
	{"memory fraction", withWorkers("memory: 67108864.5"), "must be a quantity such as 12Gi"},
	{"cpu", withWorkers("memory: 64Mi, cpu: 250m"), ""},
	{"cpu number", withWorkers("memory: 64Mi, cpu: 2"), ""},
	{"cpu fraction", withWorkers(`memory: 64Mi, cpu: "0.5"`), ""},
	{"cpu least", withWorkers("memory: 64Mi, cpu: 10m"), ""},
	{"cpu zero", withWorkers("memory: 64Mi, cpu: 0"), "cpu of a worker must be at least 10m"},
	{"cpu negative", withWorkers("memory: 64Mi, cpu: -1"), "cpu of a worker must be at least 10m"},
	{"cpu too small", withWorkers("memory: 64Mi, cpu: 9m"), "cpu of a worker must be at least 10m"},
	{"cpu too large", withWorkers("memory: 64Mi, cpu: 1001"), "cpu of a worker must be at most 1k"},
	{"cpu in words", withWorkers("memory: 64Mi, cpu: two"), `"two": must be a quantity`},
	{"cpu exponent that Go does not read", withWorkers("memory: 64Mi, cpu: '1e.5'"), "spec.workers.cpu: \"1e.5\": must be a quantity such as 250m"},
	{"cpuLimit", withWorkers("memory: 64Mi, cpu: 250m, cpuLimit: 2"), ""},
	{"cpuLimit zero", withWorkers("memory: 64Mi, cpuLimit: 0"), "cpuLimit of a worker must be at least 10m"},
	{"cpuLimit too large", withWorkers("memory: 64Mi, cpuLimit: 1001"), "cpuLimit of a worker must be at most 1k"},
	{"cpuLimit exponent that Go does not read", withWorkers("memory: 64Mi, cpuLimit: '1e.5'"), "spec.workers.cpuLimit: \"1e.5\": must be a quantity such as 250m"},
	{"replicas", withWorkers("memory: 64Mi, replicas: 1000"), ""},
	{"replicas zero", withWorkers("memory: 64Mi, replicas: 0"), "spec.workers.replicas: 0: should be greater than or equal to 1"},
	{"replicas too many", withWorkers("memory: 64Mi, replicas: 1001"), "spec.workers.replicas"},
	{"replicas text", withWorkers(`memory: 64Mi, replicas: "3"`), "spec.workers.replicas: must be a whole number"},
	{"copies", withWorkers("memory: 64Mi, replicas: 3, copies: 3"), ""},
	{"copies zero", withWorkers("memory: 64Mi, copies: 0"), "spec.workers.copies: 0: should be greater"},
	{"copies exceed replicas", withWorkers("memory: 64Mi, replicas: 2, copies: 3"), "spec.workers.copies: copies must not exceed replicas"},
	{"copies exceed the default", withWorkers("memory: 64Mi, copies: 2"), "copies must not exceed replicas"},

	{"template", withWorkers(`memory: 64Mi, template: {metadata: {labels: {app: x}, annotations: {a/b: "c d"}}, spec: {nodeSelector: {disk: ram}, tolerations: [{key: a, operator: Exists}], schedulerName: s, priorityClassName: p, serviceAccountName: a,
		affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: In, values: [b]}]}]}}}}}`), ""},
	{"template with other fields", withWorkers("memory: 64Mi, template: {spec: {hostNetwork: true}}"), "spec.workers.template.spec.hostNetwork: there is no such field"},
	{"template with containers", withWorkers("memory: 64Mi, template: {spec: {containers: []}}"), "spec.workers.template.spec.containers: there is no such field"},
	{"template own label", withWorkers("memory: 64Mi, template: {metadata: {labels: {data.stepcache.dev/dataset: x}}}"), "the controller's own"},
	{"template own annotation", withWorkers("memory: 64Mi, template: {metadata: {annotations: {data.stepcache.dev/x: x}}}"), "the controller's own"},
	{"template bad label", withWorkers("memory: 64Mi, template: {metadata: {labels: {a: 'b c'}}}"), "the value of a label is"},
	{"template empty account", withWorkers(`memory: 64Mi, template: {spec: {serviceAccountName: ""}}`), "spec.workers.template.spec.serviceAccountName"},

	{"node zero", with("node: {memory: 0}"), ""},
	{"node empty", with("node: {}"), ""},
	{"node negative", with("node: {memory: -1}"), "must not be negative"},
	{"node too large", with("node: {memory: 65Ti}"), "must be at most 64Ti"},
	{"node exponent that Go does not read", with("node: {memory: '1e1.5'}"), "spec.node.memory: \"1e1.5\": must be a quantity such as 12Gi"},
	{"access unknown", with("access: ReadOnce"), `spec.access: Unsupported value: "ReadOnce"`},
	{"access ReadWrite", with("access: ReadWrite"), ""},
	{"access ReadWrite of a dataset", "{mounts: [{source: 'dataset://a/b'}], " + workers + ", access: ReadWrite}", "cannot write into another Dataset"},
	{"shareWith", with("shareWith: [a, b-1]"), ""},
	{"shareWith twice", with("shareWith: [a, a]"), `spec.shareWith[1]: "a" is there twice`},
	{"shareWith bad", with("shareWith: ['*']"), "must be the name of a namespace"},
	{"write Back", "{" + mounts + ", workers: {memory: 64Mi, replicas: 2, copies: 2}, access: ReadWrite, write: {policy: Back, exclusive: true}}", ""},
	{"write Back with one copy", with("access: ReadWrite, write: {policy: Back}"), "it needs workers.copies of at least 2"},
	{"write Back read-only", "{" + mounts + ", workers: {memory: 64Mi, replicas: 2, copies: 2}, write: {policy: Back}}", "write policy Back needs access: ReadWrite"},
	{"write unknown", with("write: {policy: Around}"), "spec.write.policy: Unsupported value"},
	{"exclusive read-only", with("write: {exclusive: true}"), "write.exclusive needs access: ReadWrite"},
	{"refresh", with("refresh: {policy: Interval, interval: 1h30m10s}"), ""},
	{"refresh without interval", with("refresh: {policy: Interval}"), "refresh policy Interval needs an interval"},
	{"refresh never with interval", with("refresh: {interval: 1h}"), "refresh.interval has no effect with policy Never"},
	{"refresh too often", with("refresh: {policy: Interval, interval: 9s}"), "interval must be a duration of at least 10s"},
	{"refresh zero", with("refresh: {policy: Interval, interval: 0s}"), "interval must be a duration of at least 10s"},
	{"refresh empty", with("refresh: {policy: Interval, interval: ''}"), "interval must be a duration of at least 10s"},
	{"refresh in days", with("refresh: {policy: Interval, interval: 1d}"), "interval must be a duration of at least 10s"},
	{"refresh negative", with("refresh: {policy: Interval, interval: -1h}"), "interval must be a duration of at least 10s"},
	{"refresh number", with("refresh: {policy: Interval, interval: 60}"), "spec.refresh.interval: must be text"},
	{"refresh ReadWrite", with("access: ReadWrite, refresh: {policy: Interval, interval: 1h}"), "has no snapshot to refresh"},
	{"locality", with("locality: Require"), ""},
	{"locality unknown", with("locality: Always"), "spec.locality: Unsupported value"},
	{"replaces", with("replaces: [{claimName: oss-data}, {claimName: b.c}]"), ""},
	{"replaces twice", with("replaces: [{claimName: a}, {claimName: a}]"), "is there twice"},
	{"replaces bad", with("replaces: [{claimName: A_b}]"), "must be the name of a claim"},
	{"replaces itself", with("replaces: [{claimName: genomes}]"), "cannot replace the claim of its own name"},

	{"unknown field", with("worker: {}"), "spec.worker: there is no such field; did you mean workers?"},
	{"unknown field far from any", with("tieredStore: {}"), "spec.tieredStore: there is no such field; remove it"},
	{"unknown field of a mount", mount(`source: "s3://bucket", mountPoint: x`), "spec.mounts[0].mountPoint: there is no such field"},
	{"unknown field of a worker", withWorkers("memory: 64Mi, replcas: 3"), "did you mean replicas?"},
}

var loadRules = []rule{
	{"least", "{datasetRef: {name: genomes}}", ""},
	{"all", `{datasetRef: {name: genomes}, paths: ["/shards/**", "/a/[a-c]?.{fa,fb}"], copies: 1, pin: true, schedule: "0 3 * * *", ttlSecondsAfterFinished: 0}`, ""},
	{"datasetRef missing", "{}", "spec.datasetRef is missing"},
	{"datasetRef text", "{datasetRef: genomes}", "spec.datasetRef: must be a map of fields"},
	{"datasetRef empty", "{datasetRef: {name: ''}}", "must be the name of an object"},
	{"datasetRef number", "{datasetRef: {name: 3}}", "spec.datasetRef.name: must be text; put it in quotes"},
	{"paths none", "{datasetRef: {name: genomes}, paths: []}", "spec.paths"},
	{"paths twice", "{datasetRef: {name: genomes}, paths: [/a, /a]}", "is there twice"},
	{"path with parent", "{datasetRef: {name: genomes}, paths: [/a/../b]}", "has no empty, . or .. folder in it"},
	{"copies zero", "{datasetRef: {name: genomes}, copies: 0}", "spec.copies"},
	{"copies exceed workers", "{datasetRef: {name: genomes}, copies: 2}", "spec.copies: 2: must not exceed the 1 workers of Dataset default/genomes"},
	{"schedule and runAfter", `{datasetRef: {name: genomes}, schedule: "@daily", runAfter: {name: other}}`, "set schedule or runAfter, not both"},
	{"runAfter itself", `{datasetRef: {name: genomes}, runAfter: {name: warm}}`, "a DataLoad cannot run after itself"},
	{"ttl negative", "{datasetRef: {name: genomes}, ttlSecondsAfterFinished: -1}", "spec.ttlSecondsAfterFinished"},
	{"unknown field", "{datasetRef: {name: genomes}, path: [/a]}", "did you mean paths?"},
}

func TestDatasetRules(t *testing.T) {
	for _, r := range datasetRules {
		t.Run(r.name, func(t *testing.T) {
			check(t, r, "apiVersion: data.stepcache.dev/v1alpha1\nkind: Dataset\nmetadata: {name: genomes}\nspec: "+r.spec+
				// What dataset:// sources of the rules name, so that only the rule is tested.
				"\n---\n"+other("ns", "name")+"---\n"+other("a", "b"))
		})
	}
}

func other(namespace, name string) string {
	return "apiVersion: data.stepcache.dev/v1alpha1\nkind: Dataset\nmetadata: {name: " + name + ", namespace: " + namespace + "}\nspec: {" + mounts + ", " + workers + ", shareWith: [default]}\n"
}

func TestDataLoadRules(t *testing.T) {
	for _, r := range loadRules {
		t.Run(r.name, func(t *testing.T) {
			check(t, r, dataset+"---\napiVersion: data.stepcache.dev/v1alpha1\nkind: DataLoad\nmetadata: {name: warm}\nspec: "+r.spec+"\n")
		})
	}
}

func check(t *testing.T, r rule, manifest string) {
	t.Helper()
	_, err := Parse("m.yaml", []byte(manifest))
	if r.want != "" {
		refused(t, err, r.want)
		return
	}
	if err != nil {
		t.Error(err)
	}
}

func TestDatasetNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "genomes-2": true, strings.Repeat("a", 40): true,
		strings.Repeat("a", 41): false, "2genomes": false, "a.b": false, "a-": false, "A": false, "Genomes_X": false,
	} {
		_, err := Parse("m.yaml", []byte(strings.Replace(dataset, "genomes", name, 1)))
		if ok && err != nil {
			t.Error(err)
		} else if !ok {
			refused(t, err, "metadata: the name of a Dataset also names its workers")
			if strings.Contains(err.Error(), "metadata.name") {
				t.Errorf("%s is told by the rule of other objects' names, too: %v", name, err)
			}
		}
	}
}

// The name of a Dataset that takes puts is its bucket's.
func TestNamesThatAreNoBucketsAreRefusedOfDatasetsThatTakePuts(t *testing.T) {
	for name, ok := range map[string]bool{
		"abc": true, strings.Repeat("a", 40): true, "a--b": true, "s3alias": true, "my-xn--s": true, "artifacts-s3": true, "a-x-s3": true,
		"a": false, "ab": false, "xn--a": false, "sthree-a": false, "sthree-configurator": false, "amzn-s3-demo-a": false,
		"a-s3alias": false, "a--ol-s3": false, "a--op-s3": false, "a--x-s3": false, "a--xa-s3": false, "a--table-s3": false,
	} {
		const rule = "metadata: the name of a Dataset with access: ReadWrite is also the name of its bucket: at least 3 characters"
		manifest := func(access string) []byte {
			return []byte("apiVersion: data.stepcache.dev/v1alpha1\nkind: Dataset\nmetadata: {name: " + name + "}\nspec: " + with("access: "+access))
		}
		if _, err := Parse("m.yaml", manifest("ReadWrite")); ok && err != nil {
			t.Error(err)
		} else if !ok {
			refused(t, err, rule)
		}
		if _, err := Parse("m.yaml", manifest("ReadOnly")); err != nil {
			t.Errorf("a Dataset that only reads: %v", err)
		}
	}
}
