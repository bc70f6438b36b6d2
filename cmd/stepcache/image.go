package main

import (
	"context"
	"fmt"
	"os"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// envPod names this process's own pod.
const envPod = "POD_NAME"

// needImage is the error of a command that neither is given an image nor can know its own.
func needImage(command, image string) error {
	if image != "" || os.Getenv(envPod) != "" {
		return nil
	}
	return usage{fmt.Errorf("%s: --image is missing: name the image, which is this program's own, or set %s, so that it is read from this pod", command, envPod)}
}

// ownImage is the image of this process's own container, as its pod names it. Whatever sets the image of an
// installation (kustomize in any layer, kubectl set image, a chart) sets that of workers and injected containers
// along, which a second mention in an argument would not follow.
func ownImage(ctx context.Context, cluster *rest.Config, namespace, container string) (string, error) {
	name := os.Getenv(envPod)
	c, err := kubernetes.NewForConfig(cluster)
	if err != nil {
		return "", err
	}
	pod, err := c.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("%s: the image of this pod is not known: %w", container, err)
	}
	for i := range pod.Spec.Containers {
		if pod.Spec.Containers[i].Name == container {
			return pod.Spec.Containers[i].Image, nil
		}
	}
	return "", usage{fmt.Errorf("%s: pod %s/%s has no container named %s, whose image would be taken: give --image", container, namespace, name, container)}
}
