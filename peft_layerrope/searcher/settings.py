"""What a search can be told, validated before any work."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import LayerRopeConfig
from ..errors import SearchError
from ..evaluation import DEFAULT_BATCH_TOKENS, DEFAULT_WEIGHTS, check_weights
from .evaluator import OBJECTIVES, Objective
from .genetic import ELITES
from .grid import FactorGrid, default_scaled_layers


@dataclass(frozen=True)
class SearchSettings:
    """Settings of [`search`].

    Args:
        rope_type: `"default"`, `"linear"` (PI) or `"dynamic"` (Dynamic-NTK).
        factor: global factor of `"linear"` and `"dynamic"`.
        original_max_position_embeddings: trained window for `"dynamic"`; default: the model's.
        objective: `"log_prob"` of the gold answer (guides better) or `"accuracy"`.
        weights: λ_first, λ_middle, λ_last of context utilisation.
        grid: allowed factors.
        scaled_layers: layers that the search may scale; default: all but the first 2 of every 32.
        population: curves per generation.
        generations: generations after the first.
        refine: whether coordinate refinement follows the curve.
        refine_evaluations: vectors that refinement may evaluate.
        controls: whether the controls (shared-factor families, random search) are searched too.
        search_groups: independent contexts to search on; each is asked at every gold position.
        test_groups: independent contexts of the held-out table.
        batch_tokens: tokens per forward pass.
        seed: seed of the searchers. The task has a seed of its own.

    Raises:
        SearchError: a `ValueError` that names the setting, its value and what was expected.
    """

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    objective: Objective = "log_prob"
    weights: tuple[float, float, float] = DEFAULT_WEIGHTS
    grid: FactorGrid = field(default_factory=FactorGrid)
    scaled_layers: tuple[int, ...] | None = None
    population: int = 16
    generations: int = 5
    refine: bool = True
    refine_evaluations: int = 40
    controls: bool = True
    search_groups: int = 16
    test_groups: int = 200
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        self.adapter_config()  # rope_type, factor and window, by the adapter's own rules
        check_weights(self.weights)
        if self.objective not in OBJECTIVES:
            raise SearchError(f"objective={self.objective!r} is unknown, expected one of {', '.join(OBJECTIVES)}.")
        minimums = {
            "population": ELITES + 2,
            "generations": 0,
            "refine_evaluations": 0,
            "search_groups": 1,
            "test_groups": 2,
            "batch_tokens": 1,
            "seed": 0,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise SearchError(f"{name}={value!r} must be an integer of at least {minimum}.")

    def adapter_config(self, layer_factors: list[float] | None = None, **provenance: Any) -> LayerRopeConfig:
        """Returns the adapter config that these settings and `layer_factors` make."""
        return LayerRopeConfig(
            task_type="CAUSAL_LM",
            inference_mode=True,
            rope_type=self.rope_type,
            factor=self.factor,
            original_max_position_embeddings=self.original_max_position_embeddings,
            layer_factors=layer_factors,
            **provenance,
        )

    def layers_to_scale(self, num_layers: int) -> tuple[int, ...]:
        """Returns the layers to scale in a model with `num_layers`.

        Raises:
            SearchError: a layer index is out of range or named twice, or no layer is left.
        """
        if self.scaled_layers is None:
            return default_scaled_layers(num_layers)
        layers = tuple(sorted(set(self.scaled_layers)))
        if not layers or len(layers) != len(self.scaled_layers) or layers[0] < 0 or layers[-1] >= num_layers:
            raise SearchError(
                f"scaled_layers={list(self.scaled_layers)} must be distinct layer indices from 0 to {num_layers - 1}."
            )
        return layers

    def max_evaluations(self) -> int:
        """Upper limit on the distinct vectors that the per-layer search evaluates."""
        refinement = self.refine_evaluations if self.refine else 0
        return self.population * (self.generations + 1) + refinement

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for a JSON report."""
        return asdict(self)
