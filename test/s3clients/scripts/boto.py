# boto3: put, parts, range, list with delimiter, copy, copied parts, conditions, presigned addresses, delete.
import os, urllib.request, ssl
import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

bucket, prefix, ca = os.environ["BUCKET"], os.environ["PREFIX"], os.environ.get("AWS_CA_BUNDLE")
s3 = boto3.client("s3", endpoint_url=os.environ["ENDPOINT"], config=Config(s3={"addressing_style": "path"}, signature_version="s3v4", retries={"total_max_attempts": 1}))
read = lambda name: open(name, "rb").read()
small, large, odd = read("small"), read("large"), "b c+d&e=ü日本"

def body(key, **more):
    return s3.get_object(Bucket=bucket, Key=prefix + key, **more)["Body"].read()

def refused(code, call, **more):
    try:
        call(Bucket=bucket, **more)
    except ClientError as e:
        assert e.response["Error"]["Code"] in code.split("|"), (code, e.response)
    else:
        raise AssertionError(f"{call.__name__} {more}: not refused with {code}")

assert bucket in [b["Name"] for b in s3.list_buckets()["Buckets"]]
s3.head_bucket(Bucket=bucket)
s3.get_bucket_location(Bucket=bucket)
assert "Status" not in s3.get_bucket_versioning(Bucket=bucket)

put = s3.put_object(Bucket=bucket, Key=prefix + "/a/small", Body=small, ContentType="text/x-test", CacheControl="no-cache", Metadata={"origin": "step 1"})
head = s3.head_object(Bucket=bucket, Key=prefix + "/a/small")
assert head["ETag"] == put["ETag"] and head["ContentType"] == "text/x-test" and head["CacheControl"] == "no-cache" and head["Metadata"] == {"origin": "step 1"}, head
assert body("/a/small") == small
for algorithm in ["CRC32", "SHA1", "SHA256"]:
    s3.put_object(Bucket=bucket, Key=prefix + "/sums/" + algorithm, Body=small, ChecksumAlgorithm=algorithm)
    assert body("/sums/" + algorithm) == small
parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20, max_concurrency=4)
s3.upload_file("large", bucket, prefix + "/a/large", Config=parts)
assert s3.head_object(Bucket=bucket, Key=prefix + "/a/large")["ETag"].endswith('-3"')
s3.upload_file(odd, bucket, prefix + "/a/" + odd)
s3.upload_file("empty", bucket, prefix + "/a/deep/empty")
assert body("/a/large") == large and body("/a/" + odd) == read(odd) and body("/a/deep/empty") == b""
s3.download_file(bucket, prefix + "/a/large", "back", Config=parts)
assert read("back") == large

assert body("/a/large", Range="bytes=5242870-5242889") == large[5242870:5242890]
assert body("/a/large", Range="bytes=-9") == large[-9:]
refused("InvalidRange", s3.get_object, Key=prefix + "/a/small", Range="bytes=150000-")
refused("PreconditionFailed", s3.get_object, Key=prefix + "/a/small", IfMatch='"other"')
refused("304", s3.get_object, Key=prefix + "/a/small", IfNoneMatch=put["ETag"])
refused("NoSuchKey", s3.get_object, Key=prefix + "/a/none")

page = s3.list_objects_v2(Bucket=bucket, Prefix=prefix + "/a/", Delimiter="/")
assert [o["Key"] for o in page["Contents"]] == [prefix + "/a/" + n for n in sorted([odd, "large", "small"])], page
assert [p["Prefix"] for p in page["CommonPrefixes"]] == [prefix + "/a/deep/"]
for call in ["list_objects_v2", "list_objects"]:
    for size in [1, 2, 1000]:
        found = [o["Key"] for p in s3.get_paginator(call).paginate(Bucket=bucket, Prefix=prefix + "/a/", PaginationConfig={"PageSize": size}) for o in p.get("Contents", [])]
        assert found == [prefix + "/a/" + n for n in sorted([odd, "large", "small", "deep/empty"])], found

s3.copy_object(Bucket=bucket, Key=prefix + "/copy of", CopySource={"Bucket": bucket, "Key": prefix + "/a/" + odd})
assert body("/copy of") == read(odd)
s3.copy({"Bucket": bucket, "Key": prefix + "/a/large"}, bucket, prefix + "/copied in parts", Config=parts)
assert body("/copied in parts") == large

upload = s3.create_multipart_upload(Bucket=bucket, Key=prefix + "/aborted")["UploadId"]
s3.upload_part(Bucket=bucket, Key=prefix + "/aborted", UploadId=upload, PartNumber=7, Body=small)
assert [p["PartNumber"] for p in s3.list_parts(Bucket=bucket, Key=prefix + "/aborted", UploadId=upload)["Parts"]] == [7]
assert upload in [u["UploadId"] for u in s3.list_multipart_uploads(Bucket=bucket, Prefix=prefix + "/aborted")["Uploads"]]
s3.abort_multipart_upload(Bucket=bucket, Key=prefix + "/aborted", UploadId=upload)
refused("NoSuchUpload", s3.list_parts, Key=prefix + "/aborted", UploadId=upload)

context = ssl.create_default_context(cafile=ca) if ca else None
url = s3.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": prefix + "/presigned"}, ExpiresIn=60)
urllib.request.urlopen(urllib.request.Request(url, data=small, method="PUT", headers={"Content-Type": ""}), context=context)
url = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": prefix + "/presigned", "ResponseContentType": "text/y"}, ExpiresIn=60)
answer = urllib.request.urlopen(url, context=context)
assert answer.read() == small and answer.headers["Content-Type"] == "text/y"

s3.delete_object(Bucket=bucket, Key=prefix + "/presigned")
keys = [{"Key": o["Key"]} for p in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/") for o in p["Contents"]]
assert len(keys) >= 9 and not s3.delete_objects(Bucket=bucket, Delete={"Objects": keys}).get("Errors")
assert s3.list_objects_v2(Bucket=bucket, Prefix=prefix + "/")["KeyCount"] == 0
