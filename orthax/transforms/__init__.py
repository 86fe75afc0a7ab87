"""What happens to an update: gradient transformations for `optax.chain`."""

from orthax._spelling import american as _american
from orthax.transforms._component_rms import (
    ScaleByComponentRMSState as ScaleByComponentRMSState,
    scale_by_component_rms as scale_by_component_rms,
)
from orthax.transforms._decay import add_cautious_decay as add_cautious_decay
from orthax.transforms._momentum import (
    NesterovEMAState as NesterovEMAState,
    nesterov_ema as nesterov_ema,
)
from orthax.transforms._norm import (
    NuclearNorm as NuclearNorm,
    OriginalNorm as OriginalNorm,
    restore_norm as restore_norm,
)
from orthax.transforms._normalise import (
    normalise as normalise,
    normalise_components as normalise_components,
)
from orthax.transforms._orthogonalise import orthogonalise as orthogonalise
from orthax.transforms._shape import (
    ConvSpectral as ConvSpectral,
    MaxDim as MaxDim,
    RMSMatch as RMSMatch,
    ShapeRule as ShapeRule,
    Spectral as Spectral,
    Width as Width,
    scale_by_shape as scale_by_shape,
)
from orthax.transforms._sphere import (
    on_sphere as on_sphere,
    scale_to_weights as scale_to_weights,
)

__getattr__ = _american(__name__)
