#!/usr/bin/env bash
# Build the sdist and the wheel, check what is in them, install the wheel in a clean
# virtual environment, use it there, and check the types of the public names.
#
#   bash scripts/package.sh [FOLDER]     where the two files are left; default dist/
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
dist=$(realpath -m "${1:-dist}")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
python3 -m venv "$work/build"
"$work/build/bin/pip" install --quiet "build>=1.2" "pyright[nodejs]>=1.1.400" "twine>=6"

rm -rf "$dist"
# The wheel is built from the sdist, which must therefore be whole.
"$work/build/bin/python" -m build --outdir "$dist" .
"$work/build/bin/twine" check --strict "$dist"/*
"$work/build/bin/python" scripts/contents.py "$dist"

cd "$work"  # away from the checkout
python3 -m venv clean
wheel=("$dist"/*.whl)
clean/bin/pip install --quiet "${wheel[0]}"
clean/bin/python -m orthax
clean/bin/python "$root/scripts/smoke.py"

# As a type checker sees the names that users write, Flax included.
clean/bin/pip install --quiet "${wheel[0]}[flax]"
mkdir tests
cp "$root/pyproject.toml" .
cp "$root/tests/typed_use.py" tests
build/bin/pyright --pythonpath clean/bin/python
