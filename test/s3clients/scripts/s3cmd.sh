# s3cmd: put, parts, ranged (continued) get, list with delimiter, copy, move, sync, delete.
set -euxo pipefail
cat >config <<CONFIG
[default]
access_key = $AWS_ACCESS_KEY_ID
secret_key = $AWS_SECRET_ACCESS_KEY
host_base = $HOST
host_bucket = $HOST
use_https = False
bucket_location = $AWS_DEFAULT_REGION
multipart_chunk_size_mb = 5
max_retries = 1
CONFIG
s3() { s3cmd -c config --no-progress "$@"; }
to="s3://$BUCKET/$PREFIX"

mkdir -p tree/deep
ln small large "b c+d&e=ü日本" tree
ln empty tree/deep
s3 put --recursive tree/ "$to/a/"
head -c 5000000 large >continued
s3 get --continue "$to/a/large" continued
cmp continued large

s3 ls "$to/a/" >listing
grep -q 'DIR .*/a/deep/' listing
grep -q 'b c+d&e=ü日本' listing
[ "$(wc -l <listing)" -eq 4 ]
s3 info "$to/a/small" >info
grep -q 'File size: 150000' info

s3 cp "$to/a/large" "$to/a/copied in parts"
s3 mv "$to/a/small" "$to/a/moved"
s3 del "$to/a/deep/empty"

mkdir back
s3 sync "$to/a/" back/
cmp back/large large
cmp "back/b c+d&e=ü日本" "b c+d&e=ü日本"
cmp "back/copied in parts" large
cmp back/moved small
[ "$(find back -type f | wc -l)" -eq 4 ]

s3 del --recursive --force "$to/"
[ -z "$(s3 ls --recursive "$to/")" ]
