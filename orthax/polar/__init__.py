"""Matrices in, orthogonal polar factors out.

Shapes: `b` matrices in a batch, `m` rows, `n` columns, `*batch` any leading axes.
"""

from orthax.polar._auto import Auto as Auto
from orthax.polar._coefficients import (
    CANS as CANS,
    CLASSIC_CUBIC as CLASSIC_CUBIC,
    CLASSIC_QUINTIC as CLASSIC_QUINTIC,
    DEEPSEEK_V4 as DEEPSEEK_V4,
    DION as DION,
    JORDAN as JORDAN,
    polar_express as polar_express,
)
from orthax.polar._dwh import DWH as DWH
from orthax.polar._gram_eigh import GramEigh as GramEigh
from orthax.polar._method import PolarMethod as PolarMethod
from orthax.polar._newton_schulz import NewtonSchulz as NewtonSchulz
from orthax.polar._polar_factor import polar_factor as polar_factor
from orthax.polar._qdwh import QDWH as QDWH
from orthax.polar._svd import SVD as SVD
