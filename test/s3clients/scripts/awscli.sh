# aws-cli: put, parts, range, list with delimiter, copy, delete, presigned address.
set -euxo pipefail
aws() { command aws --endpoint-url "$ENDPOINT" --cli-connect-timeout 20 "$@"; }
cp() { aws s3 cp --no-progress "$@"; }
mkdir -p .aws
printf '[default]\ns3 =\n  addressing_style = path\n  multipart_threshold = 5MB\n  multipart_chunksize = 5MB\n  signature_version = s3v4\n' >.aws/config
to="s3://$BUCKET/$PREFIX"

cp small "$to/a/small" --content-type text/x-test --metadata origin=step-1
mkdir -p tree/deep
ln large "b c+d&e=ü日本" tree
ln empty tree/deep
aws s3 sync --no-progress tree "$to/a"
cp "$to/a/large" - | cmp - large

aws s3api head-object --bucket "$BUCKET" --key "$PREFIX/a/small" >head
grep -q '"origin": "step-1"' head
grep -q '"ContentType": "text/x-test"' head
aws s3api get-object --bucket "$BUCKET" --key "$PREFIX/a/large" --range bytes=5242870-5242889 part >/dev/null
cmp part <(tail -c +5242871 large | head -c 20)

aws s3 ls --page-size 2 "$to/a/" >listing
grep -q 'PRE deep/' listing
grep -q 'b c+d&e=ü日本' listing
[ "$(wc -l <listing)" -eq 4 ]

cp "$to/a/large" "$to/a/copied in parts"
aws s3 mv --no-progress "$to/a/b c+d&e=ü日本" "$to/a/moved"

url=$(aws s3 presign "$to/a/small" --expires-in 60)
python3 - "$url" small <<'PY'
import sys, urllib.request
assert urllib.request.urlopen(sys.argv[1]).read() == open(sys.argv[2], "rb").read()
PY

aws s3 sync --no-progress "$to/a" back
cmp back/small small
cmp back/large large
cmp back/deep/empty empty
cmp "back/copied in parts" large
cmp back/moved "b c+d&e=ü日本"
[ ! -e "back/b c+d&e=ü日本" ]

aws s3 rm --recursive "$to/"
[ -z "$(aws s3 ls --recursive "$to/")" ]
