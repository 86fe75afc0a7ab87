#!/usr/bin/env bash
# Run what is missing of the benchmarks for the device at hand, the most wanted first.
#
#   bash scripts/benchmarks.sh DIR          into the CSV files of a folder, one per device
#   SECONDS_EACH=540 bash scripts/benchmarks.sh DIR    with a limit for each command
#
# Rows are written as they finish, and what is there is left out: called again with the
# same folder it goes on. `python -m benchmarks.report --merge DIR` takes the rows over.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?"usage: bash scripts/benchmarks.sh DIR"}

wanted=(resnet20 resnet18 resnet50 gpt2_small vit_ti16)
commands=("training --networks resnet20")
for tree in "${wanted[@]}"; do commands+=("step --trees $tree --gradients gaussian"); done
commands+=("polar" "speed")
if [ "$(python -c 'import jax; print(jax.default_backend())')" != cpu ]; then
  commands+=("speed --large")
fi
commands+=("training" "tasks" "step --gradients gaussian" "step --gradients decaying")

failed=()
for command in "${commands[@]}"; do
  echo "== $command"
  # shellcheck disable=SC2086
  timeout "${SECONDS_EACH:-0}" python -m benchmarks.$command --results "$out" ||
    failed+=("$command")
done
[ ${#failed[@]} -eq 0 ] || { printf 'not finished: %s\n' "${failed[@]}" >&2; exit 1; }
