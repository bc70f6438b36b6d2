// Package gateway is an S3 endpoint over the names of datasets.
package gateway
