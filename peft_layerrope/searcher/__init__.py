"""The search: simple choices, a factor for each layer under a bound on harm, and the held-out table."""

from .plan import Plan
from .result import ResultTable, SearchResult, TableRow
from .run import plan_search, search
from .settings import SearchSettings
from .space import FactorGrid, Factors, default_scaled_layers

__all__ = [
    "FactorGrid",
    "Factors",
    "Plan",
    "ResultTable",
    "SearchResult",
    "SearchSettings",
    "TableRow",
    "default_scaled_layers",
    "plan_search",
    "search",
]
