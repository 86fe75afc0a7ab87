#!/usr/bin/env bash
# Run the numerical tests with other instruction sets than this machine's own: of what XLA
# generates, of the libraries behind its matrix products, and of the OpenBLAS behind its
# decompositions and numpy's.
#
#   bash scripts/processors.sh               all settings that this CPU and jaxlib have
#   bash scripts/processors.sh AVX2 SSE4.2   some
#   bash scripts/processors.sh --list        their names
#
# In the Python that is active, with the project and its test dependencies. PYTEST_ADDOPTS
# is obeyed.
set -euo pipefail
cd "$(dirname "$0")/.."

tests=(polar dwh coefficients accuracy_table search stacking tasks decorrelation low_rank
  diagnostics torch_trajectory)

# Without this the products of XLA use a library that knows no limit to its instructions.
onednn=--xla_cpu_experimental_ynn_fusion_type=
# Tests of float16, to which XLA links no conversions without F16C.
half="(float16 or at_the_threshold_and_scale)"
# name | CPU flag that it needs | XLA_FLAGS | other variables | tests to leave out
settings=(
  "default||||"
  "AVX2|avx2|$onednn --xla_cpu_max_isa=AVX2|ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell|"
  "SSE4.2||$onednn --xla_cpu_max_isa=SSE4_2|ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Prescott|$half"
  "xla-SSE4.2||--xla_cpu_max_isa=SSE4_2||$half"
  "xla-AVX2|avx2|--xla_cpu_max_isa=AVX2||"
  "xla-AVX512|avx512f|--xla_cpu_max_isa=AVX512||"
  "onednn||$onednn||"
  "openblas-Haswell|avx2||OPENBLAS_CORETYPE=Haswell|"
  "openblas-SkylakeX|avx512f||OPENBLAS_CORETYPE=SkylakeX|"
  "openblas-Zen|avx2||OPENBLAS_CORETYPE=Zen|"
  "openblas-Prescott|||OPENBLAS_CORETYPE=Prescott|"
  "openblas-one-thread|||OPENBLAS_NUM_THREADS=1|"
)
names=("${settings[@]%%|*}")

if [ "${1:-}" = --list ]; then
  printf '%s\n' "${names[@]}"
  exit
fi
for name in "$@"; do
  [[ " ${names[*]} " == *" $name "* ]] || { echo "no setting '$name' (--list)" >&2; exit 2; }
done

failed=()
for line in "${settings[@]}"; do
  IFS='|' read -r name needs flags others without <<< "$line"
  [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
  if [ -n "$needs" ] && [ -r /proc/cpuinfo ] && ! grep -qw "$needs" /proc/cpuinfo; then
    echo "== $name: skipped, this CPU has no $needs"
    continue
  fi
  read -ra variables <<< "$others"
  flags="$flags ${XLA_FLAGS:-}"
  [ "$flags" = " " ] || variables+=("XLA_FLAGS=$flags")
  # XLA ends the process at a flag that it does not know.
  if ! env "${variables[@]}" python -c "import jax; jax.numpy.ones(3).sum()" &> /dev/null
  then
    echo "== $name: skipped, this jaxlib does not know $flags"
    continue
  fi
  echo "== $name: ${variables[*]:-as it is}"
  env "${variables[@]}" python -m pytest -q ${without:+-k "not $without"} \
    $(printf 'tests/test_%s.py ' "${tests[@]}") || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
echo "passed"
