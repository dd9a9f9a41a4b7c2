#!/bin/sh
# Install a built file in a bare environment, away from the repository, and run the quick start there.
#   PYTHON=python3.13 docs/tools/try_release.sh dist/kd_balance-0.1.0-py3-none-any.whl
set -eu
file=$(readlink -f "$1")
root=$(readlink -f "$(dirname "$0")/../..")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check -c "$root/constraints.txt" torch
"$folder/env/bin/pip" install -q --disable-pip-version-check -c "$root/constraints.txt" "kd-balance[plot] @ file://$file"
cp "$root/docs/tools/try_quick_start.py" "$root/docs/quick_start.md" "$folder"
cd "$folder"
PYTHONPATH= env/bin/python try_quick_start.py
echo "$(basename "$file"): installed and run on $(env/bin/python --version)"
