# rclone: put, parts, range, list, copy, move, sync, checksums, delete.
set -euxo pipefail
cat >config <<CONFIG
[t]
type = s3
provider = Other
access_key_id = $AWS_ACCESS_KEY_ID
secret_access_key = $AWS_SECRET_ACCESS_KEY
endpoint = $ENDPOINT
region = $AWS_DEFAULT_REGION
force_path_style = true
upload_cutoff = 5Mi
chunk_size = 5Mi
copy_cutoff = 5Mi
CONFIG
r() { rclone --config config --retries 1 --low-level-retries 1 "$@"; }
to="t:$BUCKET/$PREFIX"

mkdir -p tree/deep
cp small large "b c+d&e=ü日本" tree
cp empty tree/deep
r copy tree "$to/a"
r check --download tree "$to/a"
r check tree "$to/a"
[ "$(r lsf "$to/a" | sort | tr '\n' ' ')" = "$(printf '%s\n' 'b c+d&e=ü日本' deep/ large small | sort | tr '\n' ' ')" ]
[ "$(r lsf -R --files-only "$to/a" | wc -l)" -eq 4 ]
r cat --offset 5242870 --count 20 "$to/a/large" | cmp - <(tail -c +5242871 large | head -c 20)
r cat --tail 9 "$to/a/large" | cmp - <(tail -c 9 large)
r copyto "$to/a/large" "$to/copy/large"
r cat "$to/copy/large" | cmp - large
r moveto "$to/a/small" "$to/copy/moved"
r cat "$to/copy/moved" | cmp - small
head -c 3000000 large | r rcat "$to/streamed"
r cat "$to/streamed" | cmp - <(head -c 3000000 large)
r sync "$to/a" back
cmp back/large large
r purge "$to"
[ -z "$(r lsf -R "$to" 2>/dev/null)" ]
