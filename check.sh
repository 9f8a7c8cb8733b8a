#!/usr/bin/env bash
# Lint and test in a fresh environment: what is not in the requirements files is missing here too.
set -eu
CDPATH= cd -- "$(dirname -- "$(readlink -f -- "$0")")"

rm -rf .check
"${PYTHON:-python3}" -m venv .check
trap 'rm -rf .check' EXIT
.check/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
.check/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
.check/bin/python -m ruff check .
.check/bin/python -m pytest -q tests "$@"
