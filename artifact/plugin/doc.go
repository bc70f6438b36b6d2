// Package plugin is the wire of Argo's artifact driver plugins: messages, client and server, generated
// from artifact.proto (make generate). It owns nothing else; package artifact is the driver.
//
//go:generate go -C ../../tools/proto run . ../../artifact/plugin/artifact.proto
package plugin
