package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/api/manifest"
	"github.com/stepcache/stepcache/bench/host"
	"github.com/stepcache/stepcache/bench/trial"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
	"github.com/stepcache/stepcache/local"
	"github.com/stepcache/stepcache/tier"
)

func benchCommand() *cobra.Command {
	var t tierFlags
	var filenames []string
	var only, largest string
	o := trial.Options{}
	cmd := &cobra.Command{
		Use:   "bench -f FILE | --tier DIR",
		Short: "Measure this project beside native files, the bucket and other mounts, on your data",
		Long: `Reads some of a dataset's own files as steps do, and prints how fast each way was: native copies in memory, the
bucket by a parallel client, this project cold and warm, and whichever of rclone, s3fs, geesefs and mount-s3 are on
the PATH. -f takes a Dataset's manifest and makes a tier on this machine for each cold reading, so that everything
read then is fetched from the bucket, several times; --tier reads a tier that runs, which has no cold figures.

It reads the largest file up to --largest that the tier has room for, up to 10,000 files of up to 1 MiB and the whole
listing. All of that must fit this machine's memory three times. The tier that -f makes is one worker with the memory
of all that the manifest wants. Mounts need root. Other mounts need a bucket with the S3 protocol that is the
Dataset's only mount; mount-s3 does not take an authority from the Secret (ca.crt), only from the system.`,
		Example: `  stepcache bench -f genomes.yaml
  stepcache bench --tier "$STEPCACHE_TIER" --only 'large file' --rounds 5
  stepcache bench -f genomes.yaml --contenders direct,stepcache -o json`,
		Args: args(cobra.NoArgs),
	}
	t.add(cmd)
	output := jsonFlag(cmd)
	f := cmd.Flags()
	f.StringArrayVarP(&filenames, "filename", "f", nil, "manifest file, or folder of them, with one Dataset; may be repeated")
	f.StringVar(&only, "only", "", "measure the rows whose \"section: row\" matches this regular expression")
	f.StringVar(&largest, "largest", "2GiB", "size up to which a file is read as the large one")
	f.StringSliceVar(&o.Contenders, "contenders", nil, "measure only these, and native (default: all that are there)")
	f.IntVar(&o.Rounds, "rounds", 3, "samples of each row, of which the median is told")
	f.IntVar(&o.SlowRounds, "slow-rounds", 1, "samples of rows that take long")
	f.DurationVar(&o.Limit, "limit", 2500*time.Millisecond, "when a timed reading of many files ends at the latest")
	f.DurationVar(&o.Patience, "patience", 5*time.Minute, "when a reading is given up as hanging")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		n, err := humanize.ParseBytes(largest)
		if err != nil || n == 0 || n > 1<<50 {
			return usage{fmt.Errorf("bench: --largest %q: want a size such as 2GiB", largest)}
		}
		if o.Rounds < 1 || o.SlowRounds < 1 || o.Limit <= 0 || o.Patience <= 0 {
			return usage{errors.New("bench: --rounds, --slow-rounds, --limit and --patience: want more than nothing")}
		}
		if o.Only, err = regexp.Compile(only); err != nil {
			return usage{fmt.Errorf("bench: --only: %w", err)}
		}
		if err := trial.CheckContenders(o.Contenders); err != nil {
			return usage{fmt.Errorf("bench: --contenders %w", err)}
		}
		if cmd.Flags().Changed("filename") && cmd.Flags().Changed("tier") {
			return usage{errors.New("bench: -f and --tier: choose one")}
		}
		if len(filenames) > 0 {
			t.dir = ""
		} else if t.dir == "" {
			return usage{fmt.Errorf("bench: -f is missing: name a manifest, or set --tier or %s to the folder of a tier that runs", tier.Env)}
		}
		if o.Program, err = os.Executable(); err != nil {
			return err
		}
		o.Reader, o.Log = []string{o.Program, "bench", "read"}, os.Stderr
		return host.Isolated(cmd.Context(), func(ctx context.Context, dir string, mounts bool) error {
			o.Mounts = mounts
			return runBench(ctx, o, t, filenames, dir, int64(n), cmd.OutOrStdout(), *output)
		})
	}
	cmd.AddCommand(&cobra.Command{Use: "read", Hidden: true, Args: args(cobra.NoArgs), RunE: func(cmd *cobra.Command, _ []string) error {
		return trial.Read(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
	}})
	return cmd
}

func runBench(ctx context.Context, o trial.Options, t tierFlags, filenames []string, dir string, largest int64, out io.Writer, output string) error {
	// Whatever is made from here on is in this folder's memory.
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return err
	}
	var b *trial.Bucket
	var running *local.Tier
	if len(filenames) > 0 {
		set, err := manifest.Read(filenames...)
		if err != nil {
			return err
		}
		if len(set.Datasets) != 1 {
			return usage{fmt.Errorf("bench: %s: %d Datasets, want one", strings.Join(filenames, ", "), len(set.Datasets))}
		}
		if b, err = bucketOf(ctx, set, dir); err != nil {
			return err
		}
		o.Manifests = filenames
		// For the listing and the native copies; each cold reading has a tier of its own.
		if running, err = local.Start(ctx, local.Options{Manifests: filenames, Program: o.Program, Workers: 1, Gather: true, Log: os.Stderr}); err != nil {
			return err
		}
		defer running.Close()
		for _, v := range running.Env() {
			if dir, ok := strings.CutPrefix(v, tier.Env+"="); ok {
				t.dir = dir
			}
		}
	}
	folder, err := t.one()
	if err != nil {
		return err
	}
	if running == nil {
		o.Tier = folder.Dir
	}
	c, err := t.dialListed(ctx, "to take files from; measure a Dataset of the same bucket without it")
	if err != nil {
		return err
	}
	native := filepath.Join(dir, "native")
	in, err := trial.Pick(ctx, c, b, native, largest, trial.Room(ctx, folder), o.Log)
	c.Close()
	if err != nil {
		return err
	}
	if running != nil {
		running.Close()
	}
	rep, runErr := trial.Run(ctx, o, in)
	if len(rep.Rows) == 0 {
		return runErr
	}
	if output == "json" {
		return errors.Join(rep.JSON(out), runErr)
	}
	return errors.Join(rep.Print(out), runErr)
}

// bucketOf is what others need to read the manifests' Dataset; nil where they cannot. Authorities of the Secret are put
// into dir, and the environment names them.
func bucketOf(ctx context.Context, set *manifest.Set, dir string) (*trial.Bucket, error) {
	d := set.Datasets[0]
	configs, remove, err := local.Sources(set, d.Namespace+"/"+d.Name)
	if err != nil {
		return nil, err
	}
	defer remove()
	c, ok := configs["/"]
	kind, name, prefix, err := source.Split(c.URL)
	if err != nil || !ok || len(configs) != 1 || kind != "s3" {
		return nil, err
	}
	b := &trial.Bucket{Endpoint: c.Endpoint, Region: c.Region, Name: name, Prefix: prefix}
	switch {
	case b.Endpoint == "":
		b.Endpoint = "https://s3.amazonaws.com"
		if b.Region != "" {
			b.Endpoint = "https://s3." + b.Region + ".amazonaws.com"
		}
	case !strings.Contains(b.Endpoint, "://"):
		b.Endpoint = "https://" + b.Endpoint
	}
	switch c.Addressing {
	case source.AddressingPath:
		b.PathStyle = true
	case source.AddressingVirtual:
	default: // certificates are for one more name before the endpoint's
		b.PathStyle = !strings.Contains(b.Endpoint, ".amazonaws.com") && !strings.Contains(b.Endpoint, ".aliyuncs.com") ||
			strings.Contains(name, ".")
	}
	reader, err := credentials.Open(c, credentials.Options{Env: credentials.S3Env})
	if err != nil {
		return nil, err
	}
	keys, err := reader.Get(ctx)
	if err != nil {
		return nil, err
	}
	b.AccessKey, b.SecretKey, b.Token = keys.AccessKeyID, keys.AccessKeySecret, keys.SessionToken
	if c.CredentialsDir == "" {
		return b, nil
	}
	text, err := os.ReadFile(filepath.Join(c.CredentialsDir, credentials.KeyAuthorities))
	if errors.Is(err, fs.ErrNotExist) {
		return b, nil
	}
	file := filepath.Join(dir, credentials.KeyAuthorities)
	if err == nil {
		err = os.WriteFile(file, text, 0o600)
	}
	for _, env := range []string{"SSL_CERT_FILE", "CURL_CA_BUNDLE"} { // programs of Go, and s3fs
		if err == nil {
			err = os.Setenv(env, file)
		}
	}
	return b, err
}
