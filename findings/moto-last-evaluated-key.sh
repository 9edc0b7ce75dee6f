#!/usr/bin/env bash
# moto (PyPI, 5.2.5): a DynamoDB query whose limit ends with the last item gives no LastEvaluatedKey.
#
# Expected: the key is there whenever the limit was reached, also after the last item, and the next page is
#           empty: a reader that takes "no key" for the end is right, one that takes "a key" for "more to come" is
#           wrong, and only a store that does as DynamoDB does shows it.
# Seen:     two items, Limit 2: no key.
# Source:   the developer guide, "paginating table query results" (a key does not mean that more is there); run below.
# For us:   what pages through a table is tried on a store that gives the key.
# Needs:    python3 with venv.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'moto[dynamodb]==5.2.5' boto3==1.43.106
AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_DEFAULT_REGION=us-east-1 "$folder/venv/bin/python" - <<'PY'
import boto3
from moto import mock_aws

with mock_aws():
    table = boto3.resource("dynamodb").create_table(
        TableName="t", BillingMode="PAY_PER_REQUEST",
        KeySchema=[{"AttributeName": "p", "KeyType": "HASH"}, {"AttributeName": "s", "KeyType": "RANGE"}],
        AttributeDefinitions=[{"AttributeName": "p", "AttributeType": "S"}, {"AttributeName": "s", "AttributeType": "N"}])
    for number in (1, 2):
        table.put_item(Item={"p": "a", "s": number})
    key = boto3.dynamodb.conditions.Key("p").eq("a")
    keys = {limit: table.query(KeyConditionExpression=key, Limit=limit).get("LastEvaluatedKey") for limit in (1, 2)}
print(f"two items; the key after a limit of 1: {keys[1]}, of 2: {keys[2]}")
assert keys[1] is not None and keys[2] is None, "no longer as described"
print("as described: no key at the exact end")
PY
