"""Orthogonal polar factors of gradients, activations and weights, for JAX and Optax."""

import importlib as _importlib
import importlib.metadata as _metadata
import typing as _typing

from orthax import (
    components as components,
    decorrelation as decorrelation,
    diagnostics as diagnostics,
    execution as execution,
    low_rank as low_rank,
    optimisers as optimisers,
    polar as polar,
    tasks as tasks,
    transforms as transforms,
)
from orthax._spelling import american as _american
from orthax.execution import explain as explain
from orthax.optimisers import (
    muon as muon,
    normuon as normuon,
    orthogonal_adam as orthogonal_adam,
    orthogonal_lars as orthogonal_lars,
    orthogonal_sgd as orthogonal_sgd,
)
from orthax.polar import polar_factor as polar_factor
from orthax.tasks import (
    combine_tasks as combine_tasks,
    task_weights as task_weights,
)
from orthax.transforms import (
    normalise as normalise,
    normalise_components as normalise_components,
    orthogonalise as orthogonalise,
    scale_by_shape as scale_by_shape,
)

__version__ = "0.1.0"

orthogonalize = orthogonalise  # The other American spellings are found by name.

if _typing.TYPE_CHECKING:  # pragma: no cover
    from orthax import nn as nn
else:

    def __getattr__(name: str) -> _typing.Any:
        """Import `orthax.nn`, and Flax with it, when it is first asked for."""
        if name == "nn":
            return _importlib.import_module("orthax.nn")
        return _american(__name__)(name)

    def __dir__() -> list[str]:
        return sorted({*globals(), "nn"})


def _refuse_the_other_orthax() -> None:
    """Raise if the distribution `orthax` (orthogonal polynomials) is installed too."""
    try:
        other = _metadata.version("orthax")
    except _metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"The distribution 'orthax' {other} (orthogonal polynomials) and the "
        "distribution 'orthax-optim' both install a package named 'orthax', so one has "
        "overwritten files of the other. To fix this, run: pip uninstall -y orthax "
        "orthax-optim && pip install orthax-optim"
    )


_refuse_the_other_orthax()
