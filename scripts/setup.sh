#!/usr/bin/env bash
# Makes .venv in the repository and installs what the given requirement files list, with the tested versions.
#   scripts/setup.sh requirements.txt [more.txt ...]
# Run again, it installs only what changed. PYTHON names the interpreter (default: python3).
set -euo pipefail
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) found, Python 3.11 or newer is needed: set PYTHON to one" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv

arguments=()
for file in "$@"; do
    arguments+=(-r "$file")
done
wanted="$(cat "$@" config/constraints.txt | sha256sum | cut -d' ' -f1)"
mark=".venv/installed-$(printf '%s' "$*" | sha256sum | cut -c1-12)"
if [ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]; then
    # an environment whose making was interrupted, or that uv made, has no pip
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    echo "installing into .venv (a few minutes and some 7 GB the first time) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c config/constraints.txt "${arguments[@]}"
    echo "$wanted" >"$mark"
fi
