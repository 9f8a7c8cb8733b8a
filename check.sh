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
# Two tests at a time, each with one thread.
OMP_NUM_THREADS=1 .check/bin/python -m pytest -q -n 2 tests "$@"
