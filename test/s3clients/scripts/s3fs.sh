# s3fs: a mount in this script's own mount namespace: write, parts, read at an offset, list, rename, delete.
set -euxo pipefail
printf '%s:%s' "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" >passwd
chmod 600 passwd
mkdir mnt
# The mount's folder is the namespace's own: no other process ever sees it.
mount -t tmpfs none mnt
mkdir mnt/m
s3fs "$BUCKET" mnt/m -f -o url="$ENDPOINT",use_path_request_style,passwd_file="$PWD/passwd",endpoint="$AWS_DEFAULT_REGION",multipart_size=5,singlepart_copy_limit=5,retries=1,connect_timeout=20,stat_cache_expire=0 >s3fs.log 2>&1 &
fs=$!
trap 'cat s3fs.log; kill -9 $fs 2>/dev/null; umount -l mnt/m 2>/dev/null' EXIT
until mountpoint -q mnt/m; do kill -0 $fs; sleep 0.1; done

at="mnt/m/$PREFIX"
mkdir -p "$at/deep"
cp small large "b c+d&e=ü日本" "$at/"
cp empty "$at/deep/"
for f in small large "b c+d&e=ü日本"; do cmp "$at/$f" "$f"; done
cmp <(tail -c +5242871 "$at/large" | head -c 20) <(tail -c +5242871 large | head -c 20)
[ "$(ls "$at" | sort | tr '\n' ' ')" = "$(printf '%s\n' 'b c+d&e=ü日本' deep large small | sort | tr '\n' ' ')" ]
mv "$at/large" "$at/deep/moved"
cmp "$at/deep/moved" large
cp "$at/small" "$at/copy"
cmp "$at/copy" small
echo more >>"$at/copy"
cmp "$at/copy" <(cat small; echo more)
chmod 600 "$at/copy"
[ "$(stat -c %a "$at/copy")" = 600 ]
rm -r "$at"
[ ! -e "$at" ]
umount mnt/m
wait $fs
trap - EXIT
