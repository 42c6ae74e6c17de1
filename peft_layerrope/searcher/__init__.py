"""The search: a genetic algorithm over Bézier curves, refinement, controls, and the held-out table."""

from .memo import Guards
from .plan import Plan
from .result import ResultTable, SearchResult, TableRow
from .run import plan_search, search
from .settings import SearchSettings
from .space import FactorGrid, Factors, default_scaled_layers

__all__ = [
    "FactorGrid",
    "Factors",
    "Guards",
    "Plan",
    "ResultTable",
    "SearchResult",
    "SearchSettings",
    "TableRow",
    "default_scaled_layers",
    "plan_search",
    "search",
]
