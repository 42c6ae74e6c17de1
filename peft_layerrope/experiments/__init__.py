"""The paper's experiments: functions from a [`Measuring`], a task and an adapter's config to a [`Section`].

The model is left as it was found, and an adapter is judged on contexts of the test split.
"""

from .attention import run_attention
from .control_points import run_control_points
from .extrapolation import run_extrapolation
from .halves import run_halves
from .layer_sensitivity import run_sensitivity
from .measuring import Measuring
from .section import Section, SectionFigure
from .sweep import run_sweep
from .transfer import run_transfer
from .u_shape import run_u_shape

__all__ = [
    "Measuring",
    "Section",
    "SectionFigure",
    "run_attention",
    "run_control_points",
    "run_extrapolation",
    "run_halves",
    "run_sensitivity",
    "run_sweep",
    "run_transfer",
    "run_u_shape",
]
