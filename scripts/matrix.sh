#!/usr/bin/env bash
# Run the core tests on the built wheel, with every Python and set of dependencies in a
# clean virtual environment of its own.
#
#   bash scripts/matrix.sh                            all columns
#   bash scripts/matrix.sh 3.11:lowest 3.13:newest    some: PYTHON:lowest, :newest, :nightly
#
# "lowest" is what pyproject.toml allows. A Python that is not there is said to be missing
# and makes the script fail at the end; so does a column whose tests fail. PYTEST_ADDOPTS
# is obeyed. Tests that train, plot or read the checkout run in .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/python.sh

core=(polar coefficients dwh components layer_rules stacking explain tasks first_contact
  api frameworks contract)
nightly=https://us-python.pkg.dev/ml-oss-artifacts-published/jax/simple/
columns=("$@")
[ ${#columns[@]} -gt 0 ] || columns=(3.11:lowest 3.11:newest 3.13:lowest 3.13:newest)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PYTHONHASHSEED=0

# Away from the checkout, or its package would be the one that is tested.
cp -r tests pyproject.toml "$work"
for column in "${columns[@]}"; do
  first=$(interpreter "${column%%:*}") && break || true
done
[ -n "${first:-}" ] || { echo "no Python of ${columns[*]} is there" >&2; exit 1; }
"$first" -m venv "$work/build"
"$work/build/bin/pip" wheel --quiet --no-deps --wheel-dir "$work/dist" .

# Print the lowest versions that the project allows, as constraints.
lowest() {
  "$1" - <<'PYTHON'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for line in project["dependencies"] + project["optional-dependencies"]["flax"]:
    name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()
    print(f"{name}=={version}")
    if name == "jax":
        print(f"jaxlib=={version}")
PYTHON
}

run() {  # $1: interpreter, $2: lowest, newest or nightly, $3: virtual environment
  local wheel=("$work"/dist/*.whl) extra=()
  "$1" -m venv "$3" || return 1
  : > "$3/constraints"
  case "$2" in
    lowest) lowest "$3/bin/python" > "$3/constraints" || return 1 ;;
    nightly) extra=(--pre --extra-index-url "$nightly") ;;
    newest) ;;
    *) echo "'$2' is not lowest, newest or nightly" >&2; return 1 ;;
  esac
  "$3/bin/pip" install --quiet --constraint "$3/constraints" "${extra[@]}" \
    "${wheel[0]}[flax]" chex dm-haiku equinox hypothesis orbax-checkpoint pytest \
    pytest-xdist || return 1
  "$3/bin/pip" list 2>/dev/null | grep -iE "^(jax|jaxlib|flax|optax|numpy|equinox) "
  local status=0
  (cd "$work" && "$3/bin/python" -m pytest -q "${core[@]/#/tests/test_}") || status=$?
  # XLA can end a process without a word.
  [ "$status" -eq 0 ] || echo "pytest ended with $status" >&2
  return "$status"
}
core=("${core[@]/%/.py}")

failed=()
for column in "${columns[@]}"; do
  version=${column%%:*}
  echo "== $column"
  if ! python=$(interpreter "$version"); then
    echo "Python $version is missing"
    failed+=("$column (missing)")
  elif ! run "$python" "${column#*:}" "$work/venv"; then
    failed+=("$column")
  fi
  rm -rf "$work/venv"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
echo "passed: ${columns[*]}"
