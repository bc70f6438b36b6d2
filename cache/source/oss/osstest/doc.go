// Package osstest is an OSS-compatible server for tests that verifies signatures.
package osstest
