#!/usr/bin/env bash
# The notebooks in examples/notebooks: NAME.md is the source, and NAME.ipynb is made from it.
#
#   bash scripts/notebooks.sh [NAME ...]          run in full, write NAME.ipynb with outputs
#   bash scripts/notebooks.sh --check [NAME ...]  run NAME.ipynb on small sizes, write nothing
#
# Without names all of them. Needs the extra `test`; takes some minutes, the check one or two.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=examples/notebooks

check=
if [ "${1:-}" = --check ]; then
  check=yes
  shift
fi
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
  for file in "$folder"/*.md; do names+=("$(basename "$file" .md)"); done
fi

if [ -n "$check" ]; then
  # Compilation in haste, as in tests/conftest.py, which knows why the last flag is
  # for some versions alone.
  flags="--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
  case "$(python -c 'from importlib import metadata; print(metadata.version("jaxlib"))')" in
    0.7.* | 0.8.* | 0.9.* | 0.10.*) flags+=" --xla_cpu_use_fusion_emitters=false" ;;
  esac
  export XLA_FLAGS="${XLA_FLAGS:-} $flags"
  # Copies on small sizes: the metadata of a cell says which lines are others there, or
  # that it is left out.
  small=$(mktemp -d)
  trap 'rm -rf "$small"' EXIT
  python - "$folder" "$small" "${names[@]}" <<'PYTHON'
import sys
from pathlib import Path

import nbformat

folder, small, *names = sys.argv[1:]
for name in names:
    notebook = nbformat.read(Path(folder, f"{name}.ipynb"), as_version=4)
    notebook.cells = [x for x in notebook.cells if x.metadata.get("small") != "skip"]
    for cell in notebook.cells:
        for line, other in cell.metadata.get("small", ()):
            if line not in cell.source:
                sys.exit(f"{name}: no line {line!r}")
            cell.source = cell.source.replace(line, other)
    nbformat.write(notebook, Path(small, f"{name}.ipynb"))
PYTHON
  pytest --nbmake --durations=0 "$small"
  exit
fi

# What is stored depends on nothing that others do not have.
unset ORTHAX_DATA XLA_FLAGS
python - "$folder" "${names[@]}" <<'PYTHON'
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

folder, *names = sys.argv[1:]
for name in names:
    start = time.monotonic()
    notebook = jupytext.read(Path(folder, f"{name}.md"))
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1200,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": folder}},
    ).execute()
    # Nothing that changes when nothing has changed.
    notebook.metadata = {
        "jupytext": {"formats": notebook.metadata["jupytext"]["formats"]},
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02}"
    nbformat.validate(notebook)
    nbformat.write(notebook, Path(folder, f"{name}.ipynb"))
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
PYTHON
