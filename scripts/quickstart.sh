#!/usr/bin/env bash
# The whole job on an embedded base model, on a machine with neither a GPU nor a model hub: teaches a tiny Stable Diffusion
# the classes from a few photographs each, makes synthetic images, and compares classifiers with and without them.
#   scripts/quickstart.sh                 solar cells (ELPV), about 12 minutes on 2 CPU cores after the installation
#   scripts/quickstart.sh --task signs    hands that show digits, about 11 minutes; downloads 16 MB unless SIGNS_ROOT names a copy
#   scripts/quickstart.sh --smoke         either with tiny counts, to see that everything works
# It may be interrupted; run again, it resumes from what is there.
set -euo pipefail
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh requirements.txt scripts/quickstart/requirements.txt
exec .venv/bin/python scripts/quickstart/run.py "$@"
