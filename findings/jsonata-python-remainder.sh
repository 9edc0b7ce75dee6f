#!/usr/bin/env bash
# jsonata-python (PyPI, 0.7.1): the remainder of a number with a fraction loses the fraction.
#
# Expected: `5.5 % 2` is 1.5, as JSONata 2.0.6, the version that Step Functions names, gives it.
# Seen:     1, without an error: a state machine tried against an emulator that evaluates with this package
#           (ministack does) takes another way there than in AWS.
# Source:   both packages, run below.
# For us:   an expression counts as tried only where the evaluator is proven against 2.0.6.
# Needs:    python3 with venv, Node.js with npm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check jsonata-python==0.7.1
npm init --yes >/dev/null
npm install --silent --no-audit --no-fund --ignore-scripts jsonata@2.0.6
original=$(node -e "require('jsonata')('5.5 % 2').evaluate({}).then((value) => console.log(value))")
python=$(venv/bin/python -c "import jsonata; print(jsonata.Jsonata('5.5 % 2').evaluate({}))")
echo "5.5 % 2: JSONata 2.0.6 gives $original, jsonata-python 0.7.1 gives $python"
[ "$original" = 1.5 ] && [ "$python" = 1 ] || { echo 'no longer as described' >&2; exit 1; }
echo 'as described: the fraction is lost'
