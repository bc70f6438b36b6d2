package csi

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// NodeObject is a Node over the API server. It needs the right to patch nodes and, for Events, to create those in
// the namespace default.
type NodeObject struct {
	Client kubernetes.Interface
	Name   string
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

var _ Node = NodeObject{}

// Ready implements Node: one request.
func (n NodeObject) Ready(ctx context.Context, ready bool) error {
	var value any // null takes the label away
	if ready {
		value = "true"
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]any{v1alpha1.LabelNodeReady: value}}})
	if err != nil {
		return err
	}
	if _, err := n.Client.CoreV1().Nodes().Patch(ctx, n.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("label node %s: %w", n.Name, err)
	}
	return nil
}

// Event implements Node.
func (n NodeObject) Event(ctx context.Context, reason, text string) error {
	now := time.Now
	if n.Now != nil {
		now = n.Now
	}
	at := metav1.NewTime(now())
	_, err := n.Client.CoreV1().Events(metav1.NamespaceDefault).Create(ctx, &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{GenerateName: n.Name + ".", Namespace: metav1.NamespaceDefault},
		// The kubelet's own Events of a node have its name for the uid.
		InvolvedObject: corev1.ObjectReference{Kind: "Node", Name: n.Name, UID: types.UID(n.Name)},
		Reason:         reason, Message: text, Type: corev1.EventTypeWarning, Count: 1,
		FirstTimestamp: at, LastTimestamp: at,
		Source: corev1.EventSource{Component: v1alpha1.DriverName, Host: n.Name},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("event of node %s: %w", n.Name, err)
	}
	return nil
}
