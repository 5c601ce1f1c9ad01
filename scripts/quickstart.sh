#!/usr/bin/env bash
# The whole job on the embedded default, on a machine with neither a GPU nor a model hub: teaches a tiny Stable Diffusion
# ELPV's classes from 10 photographs each, makes a Diff-Mix subset, and compares three classifiers.
#   scripts/quickstart.sh              about 12 minutes on 2 CPU cores after the installation
#   scripts/quickstart.sh --smoke      the same with tiny counts, to see that everything works
# It may be interrupted; run again, it resumes from what is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh requirements.txt scripts/quickstart/requirements.txt
exec .venv/bin/python scripts/quickstart/run.py "$@"
