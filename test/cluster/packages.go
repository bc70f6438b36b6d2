package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// packages are the Debian packages that the cluster runs on, each with a file that tells that it is there.
var packages = []struct{ name, file string }{
	{"runc", "/usr/sbin/runc"},
	{"containernetworking-plugins", "/usr/lib/cni/ptp"},
	{"iproute2", "/usr/sbin/ip"},
	{"nftables", "/usr/sbin/nft"},
	{"iptables", "/usr/sbin/iptables"},
	{"conntrack", "/usr/sbin/conntrack"},
	{"busybox-static", "/bin/busybox"},
	{"fuse3", "/usr/bin/fusermount3"},
	{"ca-certificates", "/etc/ssl/certs/ca-certificates.crt"},
}

// installPackages installs what is missing and says so.
func (c *Cluster) installPackages(ctx context.Context) error {
	var missing []string
	for _, p := range packages {
		if _, err := os.Stat(p.file); err != nil {
			missing = append(missing, p.name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	c.say("installing %s", strings.Join(missing, " "))
	for _, args := range [][]string{{"update", "-q"}, append([]string{"install", "-qy", "--no-install-recommends"}, missing...)} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("install the packages %s: apt-get %s: %w\n%s", strings.Join(missing, " "), args[0], err, out)
		}
	}
	return nil
}
