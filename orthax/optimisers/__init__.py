"""Named chains of the transformations of orthax and optax, and nothing new."""

from orthax.optimisers._muon import muon, normuon
from orthax.optimisers._orthogonal import (
    orthogonal_adam,
    orthogonal_lars,
    orthogonal_sgd,
)

__all__ = [
    "muon",
    "normuon",
    "orthogonal_adam",
    "orthogonal_lars",
    "orthogonal_sgd",
]
