"""What a search can be told, validated before any work."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ..checks import is_integer, is_number
from ..errors import SearchError
from ..messages import named
from ..scoring.scorer import DEFAULT_BATCH_TOKENS
from ..scoring.scores import DEFAULT_WEIGHTS, OBJECTIVES, Objective, check_weights
from ..tuner.config import LayerRopeConfig
from .genetic import ELITES
from .genome import CURVES, Curve
from .grid import FactorGrid, default_scaled_layers
from .guards import Guards
from .space import FactorSpace

Algorithm = Literal["genetic", "cma-es", "greedy", "random"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


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
        guards: what the adapter may not make worse than the unscaled model.
        curve: what is searched: `"bezier"`, a straight line (`"linear"`) or one factor per layer (`"direct"`).
            Default: `"direct"` for the greedy algorithm, else `"bezier"`.
        algorithm: `"genetic"`, `"cma-es"`, `"greedy"` (coordinate steps from the best uniform factor) or `"random"`.
        population: curves per generation.
        generations: generations after the first. The algorithms without generations may evaluate as many distinct
            vectors as all generations have members.
        refine: whether gradient and coordinate steps follow; the validation split decides whether they helped.
        gradient_steps: gradient steps on the factors; only with the `"log_prob"` objective.
        refine_evaluations: vectors that the coordinate steps may evaluate.
        race: whether vectors that clearly lose are given up on a part of the examples.
        controls: whether the controls (shared-factor families, straight lines, random search) are searched too.
        search_groups: independent contexts to search on; each is asked at every gold position.
        validation_groups: independent contexts that decide between the curve and its refinement.
        test_groups: independent contexts of the held-out table.
        short_groups: short prompts for the guard of that name.
        bootstrap: how many times the search split is drawn again to see how the choice depends on it; 0: not at all.
        batch_tokens: tokens per forward pass; halved when memory runs out.
        share_mib: memory for the outputs of leading layers that vectors have in common, in MiB; 0 shares nothing.
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
    guards: Guards = field(default_factory=Guards)
    curve: Curve | None = None
    algorithm: Algorithm = "genetic"
    population: int = 16
    generations: int = 5
    refine: bool = True
    gradient_steps: int = 12
    refine_evaluations: int = 40
    race: bool = True
    controls: bool = True
    search_groups: int = 16
    validation_groups: int = 32
    test_groups: int = 200
    short_groups: int = 8
    bootstrap: int = 0
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    share_mib: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        self.adapter_config()  # rope_type, factor and window, by the adapter's own rules
        self._check_types()
        check_weights(self.weights)
        choices = {"objective": OBJECTIVES, "algorithm": ALGORITHMS, "curve": (*CURVES, None)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(choice for choice in allowed if choice)
                raise SearchError(f"{name}={getattr(self, name)!r} is unknown, expected one of {known}.")
        if self.algorithm == "greedy" and self.curve not in (None, "direct"):
            raise SearchError(f"algorithm='greedy' moves single layers: curve={self.curve!r} must be 'direct'.")
        minimums = {
            "population": ELITES + 2,
            "generations": 0,
            "gradient_steps": 0,
            "refine_evaluations": 0,
            "search_groups": 1,
            "validation_groups": 1,
            "test_groups": 2,
            "short_groups": 1,
            "bootstrap": 0,
            "batch_tokens": 1,
            "share_mib": 0,
            "seed": 0,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if not is_integer(value) or value < minimum:
                raise SearchError(f"{name}={value!r} must be an integer of at least {minimum}.")

    def _check_types(self) -> None:
        """What is not checked where it is used, or only after the model has run."""
        if not isinstance(self.guards, Guards):
            raise SearchError(f"guards={named(self.guards)} must be Guards(...); Guards(None, None) has no limits.")
        if not isinstance(self.grid, FactorGrid):
            raise SearchError(f"grid={named(self.grid)} must be a FactorGrid, such as FactorGrid(1.0, 2.0, 0.1).")
        if not isinstance(self.weights, (tuple, list)) or not all(map(is_number, self.weights)):
            raise SearchError(f"weights={named(self.weights)} must be three positive numbers (first, middle, last).")
        layers = self.scaled_layers
        if layers is not None and not (isinstance(layers, (tuple, list, range)) and all(map(is_integer, layers))):
            raise SearchError(f"scaled_layers={named(layers)} must be layer indices, such as (0, 1, 2), or None.")
        for name in ("refine", "race", "controls"):
            if not isinstance(getattr(self, name), bool):
                raise SearchError(f"{name}={named(getattr(self, name))} must be True or False.")

    @property
    def genome(self) -> Curve:
        """The curve that is searched."""
        return self.curve or ("direct" if self.algorithm == "greedy" else "bezier")

    @property
    def takes_gradient_steps(self) -> bool:
        """Whether gradient steps follow the search: exact matches have no gradient."""
        return self.refine and self.objective == "log_prob" and self.gradient_steps > 0

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

    def space(self, key_sources: tuple[int, ...]) -> FactorSpace:
        """Returns what may be chosen from in a model.

        Args:
            key_sources: for each layer the one whose keys it attends to, mostly itself.

        Raises:
            SearchError: a layer index is out of range, named twice or bound to another, or no layer is left.
        """
        num_layers = len(key_sources)
        own = [layer for layer, source in enumerate(key_sources) if layer == source]
        if self.scaled_layers is None:
            return FactorSpace(self.grid, tuple(i for i in default_scaled_layers(num_layers) if i in own), key_sources)
        layers = tuple(sorted(set(self.scaled_layers)))
        if not layers or len(layers) != len(self.scaled_layers) or layers[0] < 0 or layers[-1] >= num_layers:
            raise SearchError(
                f"scaled_layers={list(self.scaled_layers)} must be distinct layer indices from 0 to {num_layers - 1}."
            )
        bound = [layer for layer in layers if layer not in own]
        if bound:
            raise SearchError(
                f"scaled_layers={list(self.scaled_layers)}: layers {bound} attend to keys of layers "
                f"{[key_sources[layer] for layer in bound]} (a shared KV cache) and take their factors; name those."
            )
        return FactorSpace(self.grid, layers, key_sources)

    @property
    def search_evaluations(self) -> int:
        """Upper limit on the distinct vectors of the search before refinement."""
        return self.population * (self.generations + 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for a JSON report."""
        return asdict(self)
