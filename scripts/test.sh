#!/usr/bin/env bash
# Runs all tests on a fresh machine: makes .venv, installs, pytest.
#   scripts/test.sh                    everything
#   scripts/test.sh -m "not slow"      the fast ones; any pytest arguments
set -euo pipefail
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh requirements.txt scripts/quickstart/requirements.txt tests/requirements.txt
exec .venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder --timeout 900 \
    --durations 20 "$@"
