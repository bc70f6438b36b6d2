package csi

import (
	"strconv"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/wire"
)

// What the kubelet adds to a volume's attributes, in place of whatever a user wrote there, because the driver
// object asks for it (podInfoOnMount).
const (
	attributeEphemeral    = "csi.storage.k8s.io/ephemeral"
	attributePodNamespace = "csi.storage.k8s.io/pod.namespace"
	attributePodName      = "csi.storage.k8s.io/pod.name"
	attributePodUID       = "csi.storage.k8s.io/pod.uid"
)

// maxKeys bounds the keys of a volume, each of which is tried by itself. A rotation leaves two.
const maxKeys = 8

// volume is what the kubelet says of one.
type volume struct {
	kind   string // one of v1alpha1.Volume...
	inline bool
	pod    pod

	// Of a dataset.
	namespace, dataset string
	keys               []wire.Key
	copies             int
	memory             int64 // cap of this node's cache in bytes; negative: none

	// Of a store.
	size int64
}

type pod struct{ namespace, name, uid string }

func (p pod) String() string { return p.namespace + "/" + p.name }

// name is what handshakes with the Dataset's workers are bound to.
func (v volume) name() string { return v.namespace + "/" + v.dataset }

func invalid(format string, a ...any) error {
	return status.Errorf(codes.InvalidArgument, format, a...)
}

// parseVolume reads a volume's attributes and Secret. Nobody but the kubelet can write what decides; of an
// inline volume the user writes the rest.
func parseVolume(attributes, secret map[string]string) (volume, error) {
	v := volume{
		kind:   attributes[v1alpha1.AttributeVolume],
		inline: attributes[attributeEphemeral] == "true",
		pod:    pod{attributes[attributePodNamespace], attributes[attributePodName], attributes[attributePodUID]},
		memory: -1, copies: 1,
	}
	if v.kind == "" {
		v.kind = v1alpha1.VolumeDataset
	}
	switch v.kind {
	case v1alpha1.VolumeDataset:
		return v, v.parseDataset(attributes, secret)
	case v1alpha1.VolumeLent, v1alpha1.VolumeLender:
		return v, v.parseLent(attributes)
	case v1alpha1.VolumeStore, v1alpha1.VolumeSocket:
		// They live and die with one pod.
		if !v.inline {
			return v, invalid("volumeAttributes.%s: %q can only be an inline volume of a pod", v1alpha1.AttributeVolume, v.kind)
		}
		if err := checkUID(v.pod.uid); err != nil {
			return v, err
		}
		if v.kind == v1alpha1.VolumeStore {
			var err error
			v.size, err = number(attributes, v1alpha1.AttributeSize, 1<<20, maxStore)
			return v, err
		}
		return v, nil
	}
	return v, invalid("volumeAttributes.%s: %q is not one of %s, %s, %s, %s and %s",
		v1alpha1.AttributeVolume, v.kind, v1alpha1.VolumeDataset, v1alpha1.VolumeStore, v1alpha1.VolumeSocket, v1alpha1.VolumeLent, v1alpha1.VolumeLender)
}

// parseLent reads a volume of a pod that serves its mounts by itself. Its Dataset's name is a name only: the bytes
// come from the pod's own server, which has the key.
func (v *volume) parseLent(attributes map[string]string) error {
	if !v.inline {
		return invalid("volumeAttributes.%s: %q can only be an inline volume of a pod", v1alpha1.AttributeVolume, v.kind)
	}
	if err := checkUID(v.pod.uid); err != nil {
		return err
	}
	if v.kind == v1alpha1.VolumeLender {
		return nil
	}
	v.namespace, v.dataset = v.pod.namespace, attributes[v1alpha1.AttributeDataset]
	for _, name := range []string{v.namespace, v.dataset} {
		if len(validation.IsDNS1123Label(name)) > 0 {
			return invalid("volumeAttributes.%s: %.80q is not a name of a Dataset of namespace %.80q", v1alpha1.AttributeDataset, v.dataset, v.namespace)
		}
	}
	return nil
}

const (
	// maxStore is more than a machine has.
	maxStore = 1 << 46
	// maxCopies is a Dataset's.
	maxCopies = 16
)

func (v *volume) parseDataset(attributes, secret map[string]string) error {
	v.namespace, v.dataset = attributes[v1alpha1.AttributeNamespace], attributes[v1alpha1.AttributeDataset]
	if v.inline {
		if v.pod.namespace == "" {
			return invalid("the kubelet does not say whose pod this is; the CSIDriver object needs podInfoOnMount: true")
		}
		if v.namespace == "" {
			v.namespace = v.pod.namespace
		}
	}
	// The names become a part of paths and of the workers' address.
	for _, n := range []struct{ attribute, value string }{
		{v1alpha1.AttributeDataset, v.dataset}, {v1alpha1.AttributeNamespace, v.namespace},
	} {
		if n.value == "" {
			return invalid("volumeAttributes.%s is missing: name the Dataset and its namespace", n.attribute)
		}
		if len(validation.IsDNS1123Label(n.value)) > 0 {
			return invalid("volumeAttributes.%s: %.80q is not a name", n.attribute, n.value)
		}
	}
	key := secret[v1alpha1.KeyRead]
	if key == "" {
		if v.inline {
			return status.Errorf(codes.PermissionDenied, "dataset %s: no read key; set nodePublishSecretRef of the volume to the Secret %q, which exists in namespaces that may read the Dataset",
				v.name(), v1alpha1.ReaderName(v.dataset))
		}
		return status.Errorf(codes.PermissionDenied, "dataset %s: no read key; the PersistentVolume's nodePublishSecretRef must name the Secret %s/%s",
			v.name(), v.namespace, v1alpha1.ReaderName(v.dataset))
	}
	var err error
	if v.keys, err = wire.ParseKeys([]byte(key)); err != nil {
		return status.Errorf(codes.PermissionDenied, "dataset %s: value %q of the reader Secret: %v", v.name(), v1alpha1.KeyRead, err)
	}
	if len(v.keys) > maxKeys {
		return status.Errorf(codes.PermissionDenied, "dataset %s: value %q of the reader Secret has %d keys: each is tried by itself, and a rotation leaves two", v.name(), v1alpha1.KeyRead, len(v.keys))
	}
	// What a user writes into an inline volume decides nothing for others: there only the Secret counts.
	settings := map[string]string{}
	for _, name := range []string{v1alpha1.AttributeCopies, v1alpha1.AttributeNodeMemory} {
		if s, ok := attributes[name]; ok && !v.inline {
			settings[name] = s
		}
		if s, ok := secret[name]; ok {
			settings[name] = s
		}
	}
	if settings[v1alpha1.AttributeCopies] != "" {
		n, err := number(settings, v1alpha1.AttributeCopies, 0, maxCopies)
		if err != nil {
			return err
		}
		v.copies = max(1, int(n))
	}
	if settings[v1alpha1.AttributeNodeMemory] != "" {
		if v.memory, err = number(settings, v1alpha1.AttributeNodeMemory, 0, maxStore); err != nil {
			return err
		}
	}
	return nil
}

func number(from map[string]string, name string, least, most int64) (int64, error) {
	n, err := strconv.ParseInt(from[name], 10, 64)
	if err != nil || n < least || n > most {
		return 0, invalid("volumeAttributes.%s: %.40q is not a whole number from %d to %d", name, from[name], least, most)
	}
	return n, nil
}

// checkUID refuses what is not the uid of a pod, since it becomes a name in a folder.
func checkUID(uid string) error {
	if uid == "" {
		return invalid("the kubelet does not say whose pod this is; the CSIDriver object needs podInfoOnMount: true")
	}
	if len(validation.IsDNS1123Label(uid)) > 0 {
		return invalid("pod uid %.80q is not a uid", uid)
	}
	return nil
}
