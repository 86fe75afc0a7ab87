"""Trees, activations and gradients in, numbers to look at out; nothing is changed.

What is said of the leaves of a tree comes as a dictionary by path, `"conv/kernel"`;
what is said of matrices has one entry for each, in the order in which the leaf folds.
Everything works under `jit`; matrices and activations that are sharded are gathered.
"""

from orthax.diagnostics._gradients import (
    DeadParameters as DeadParameters,
    dead_parameters as dead_parameters,
    update_cosine as update_cosine,
)
from orthax.diagnostics._matrices import (
    SingularValues as SingularValues,
    orthogonality_error as orthogonality_error,
    polar_residual as polar_residual,
    rank_estimate as rank_estimate,
    singular_values as singular_values,
)
from orthax.diagnostics._representations import (
    RepresentationCosines as RepresentationCosines,
    cosine_threshold as cosine_threshold,
    off_diagonal_correlation as off_diagonal_correlation,
    representation_cosines as representation_cosines,
)
from orthax.diagnostics._stability import basis_stability as basis_stability
