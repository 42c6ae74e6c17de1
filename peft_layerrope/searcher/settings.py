"""What a search can be told, validated before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from .. import __version__
from ..base_model import ModelSource
from ..declaration import converted, declared, option
from ..errors import SearchError, one_line
from ..files import parse_yaml, write_atomically
from ..scoring.preflight import PREFLIGHT_GROUPS
from ..scoring.scorer import DEFAULT_BATCH_TOKENS
from ..scoring.scores import DEFAULT_WEIGHTS
from ..tasks.specification import TaskSpecification, parse_place
from ..tuner.config import FACTOR_RANGE, LayerRopeConfig
from ..tuner.scaling import RopeType
from .algorithms import ELITES
from .space import FactorGrid, FactorSpace, default_scaled_layers, parse_layers

MIN_STEPS = 4
"""Generations of a search that has little time."""
Algorithm = Literal["cma-es", "paper"]

_scaling = partial(option, panel="Scaling")
_search = partial(option, panel="Search")
_examples = partial(option, panel="Examples")
_running = partial(option, panel="Running")
_model = partial(option, panel="Model")

BatchTokens = Annotated[int, _model("Tokens per forward pass; halved when memory runs out.", ge=1)]

_Weight = Annotated[float, Field(gt=0)]


def _layers(value: Any) -> Any:
    """Layers as a command line and a file name them, such as `"0-3,7"` or `[0, 1]`."""
    if isinstance(value, str):
        return parse_layers(value)
    return tuple(value) if isinstance(value, list) else value


@declared(SearchError)
class SearchSettings:
    """Settings of [`search`]. Each is described where it is declared.

    Raises:
        SearchError: a `ValueError` that names the setting, its value and what was expected.
        InvalidConfigError: `rope_type`, `factor` and `original_max_position_embeddings` do not go together.
    """

    rope_type: Annotated[RopeType, _scaling("`default`: plain; `linear`: PI; `dynamic`: Dynamic-NTK.")] = "default"
    factor: Annotated[
        float, _scaling("Global factor of linear and dynamic.", ge=FACTOR_RANGE[0], le=FACTOR_RANGE[1])
    ] = 1.0
    original_max_position_embeddings: Annotated[
        int | None, Field(description="Trained window for `dynamic`, in tokens. Default: the model's.")
    ] = None
    grid: Annotated[FactorGrid, Field(description="Allowed factors.")] = field(default_factory=FactorGrid)
    layers_to_transform: Annotated[
        tuple[int, ...] | None,
        BeforeValidator(_layers),
        _scaling(
            "Layers that may be scaled, such as 0-3,7. Default: all; in the paper's search all but the first 2 of "
            "every 32. `layerrope sensitivity` says which are worth it.",
            "--layers-to-transform",
            "--layers",
        ),
    ] = None
    algorithm: Annotated[
        Algorithm,
        _search(
            "cma-es: generations of vectors with a factor for each layer, each generation on fresh contexts, under a "
            "bound on the change of ordinary text. paper: the genetic algorithm of arXiv 2503.04355 over Bézier "
            "curves, by the accuracy on --search-groups contexts alone; the bound then says only whether its curve "
            "may be the result."
        ),
    ] = "cma-es"
    minutes: Annotated[
        float,
        _search("Time for everything but the held-out test. Decides --steps, and nothing where those are given.", gt=0),
    ] = 20.0
    steps: Annotated[
        int | None,
        _search("Generations for the factors of all layers, instead of --minutes.", ge=1),
    ] = None
    full_controls: Annotated[
        bool,
        _search(
            "As many generations for simpler choices of two numbers as for the factors of all layers. "
            "Default: a quarter."
        ),
    ] = False
    test_minutes: Annotated[
        float,
        _search(
            "Time for the held-out test: at least 20 contexts, and at most --test-groups, which alone decide where "
            "--steps are given.",
            gt=0,
        ),
    ] = 20.0
    max_harm: Annotated[
        float | None,
        _search(
            "Bound on the harm to ordinary text, in nats: on the rise of the loss on people's text, "
            "and on the divergence from the unscaled model on text that it writes, which is the rise expected there.",
            gt=0,
        ),
    ] = 0.01
    max_distinct: Annotated[
        int | None,
        _search(
            "Different factors at most: servers keep a table for each. The nearest to what a search found are merged, "
            "and what that costs is measured. Default: any number.",
            ge=1,
        ),
    ] = None
    text: Annotated[str | None, _search("Ordinary text in UTF-8. Default: a sample that comes with the package.")] = (
        None
    )
    population: Annotated[int, _search("paper: curves per generation.", ge=ELITES + 2)] = 16
    search_groups: Annotated[int, _search("paper: contexts that each curve is judged on.", ge=1)] = 16
    weights: Annotated[
        tuple[_Weight, _Weight, _Weight], _search("paper: λ first, middle, last of context utilisation.")
    ] = DEFAULT_WEIGHTS
    seed: Annotated[int, _search("Seed of the searchers.", ge=0)] = 0
    test_groups: Annotated[int, _examples("Contexts of the held-out table.", ge=2)] = 200
    preflight_groups: Annotated[
        int, _examples("Contexts that the unscaled model answers in writing before the search.", ge=1)
    ] = PREFLIGHT_GROUPS
    anyway: Annotated[bool, _running("Search also where the unscaled model answers nothing, or everything.")] = False
    batch_tokens: BatchTokens = DEFAULT_BATCH_TOKENS

    def __post_init__(self) -> None:
        if self.max_distinct is not None and self.algorithm == "paper":
            raise SearchError(
                f"max_distinct={self.max_distinct} is not for algorithm='paper', whose factors are those of a curve."
            )
        self.grid.of(self.algorithm)  # the bounds
        self.adapter_config()  # rope_type, factor and window, by the adapter's own rules

    @property
    def factor_limits(self) -> tuple[float, float]:
        """Smallest and largest factor."""
        grid = self.grid.of(self.algorithm)
        return grid.min_factor, grid.values[-1] if self.algorithm == "paper" else grid.max_factor

    def adapter_config(self, layer_factors: list[float] | None = None) -> LayerRopeConfig:
        """Returns the adapter config that these settings and `layer_factors` make."""
        return LayerRopeConfig(
            task_type="CAUSAL_LM",
            inference_mode=True,
            rope_type=self.rope_type,
            factor=self.factor,
            original_max_position_embeddings=self.original_max_position_embeddings,
            layer_factors=layer_factors,
        )

    def space(self, key_sources: tuple[int, ...]) -> FactorSpace:
        """Returns what may be chosen from in a model; see [`FactorSpace`].

        Raises:
            SearchError: a layer index is out of range, named twice or bound to another, or no layer is left.
        """
        num_layers = len(key_sources)
        own = [layer for layer, source in enumerate(key_sources) if layer == source]
        if self.layers_to_transform is None:
            default = default_scaled_layers(num_layers) if self.algorithm == "paper" else range(num_layers)
            return FactorSpace(self.grid.of(self.algorithm), tuple(i for i in default if i in own), key_sources)
        given, layers = list(self.layers_to_transform), tuple(sorted(set(self.layers_to_transform)))
        if not layers or len(layers) != len(given) or layers[0] < 0 or layers[-1] >= num_layers:
            raise SearchError(f"layers_to_transform={given} must be distinct layer indices from 0 to {num_layers - 1}.")
        bound = [layer for layer in layers if layer not in own]
        if bound:
            raise SearchError(
                f"layers_to_transform={given}: layers {bound} attend to keys of layers "
                f"{[key_sources[layer] for layer in bound]} (a shared KV cache) and take their factors; name those."
            )
        return FactorSpace(self.grid.of(self.algorithm), layers, key_sources)


_MAX_BYTES = 1_000_000


@declared(SearchError)
class SearchSpecification(ModelSource):
    """A search, as a file can hold it: which model and how it is loaded, the task, and the settings."""

    task: Annotated[TaskSpecification, Field(description="Where the examples come from.")] = field(
        default_factory=TaskSpecification
    )
    search: Annotated[SearchSettings, Field(description="The settings.")] = field(default_factory=SearchSettings)
    keep_task: Annotated[
        str | None,
        _search(
            "Another task, or the same at another length, such as kv_retrieval:4096, on which the result does not "
            "clearly lose more than 3 points of probability of the right answers. Default: none."
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_task is not None:
            parse_place(self.keep_task, "keep_task")

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> SearchSpecification:
        """Makes a specification from plain values, nested as this class is; what is missing has its default. `source`
        is where they come from, for messages.

        Raises:
            LayerRopeError: an unknown name, with the nearest known one; a value of the wrong type or out of its range.
        """
        try:
            # of JSON, strict checks take lists for tuples and mappings for what they are to make
            return _ADAPTER.validate_json(json.dumps(values, default=str))
        except ValidationError as error:
            raise converted(error, cls, SearchError, source) from None
        except TypeError as error:  # YAML has mappings with lists for names
            raise SearchError(f"{source}: {one_line(error)}.") from error

    def save(self, path: str | Path) -> None:
        """Writes `search.yaml`, every value spelled out."""
        head = f"# layerrope search --config {Path(path).name} --output FOLDER repeats this search (v{__version__}).\n"
        plain = TypeAdapter(dict[str, Any]).dump_python(asdict(self), mode="json")
        write_atomically(Path(path), head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


_ADAPTER = TypeAdapter(SearchSpecification)


def read_specification(path: str | Path) -> dict[str, Any]:
    """Reads a `search.yaml` as plain values, for [`SearchSpecification.of`].

    Raises:
        SearchError: it cannot be read, is not YAML, or holds no mapping.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SearchError(f"{path} has {path.stat().st_size} bytes; a search.yaml has at most {_MAX_BYTES}.")
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SearchError(f"{path} is not YAML: {one_line(' '.join(str(error).split()))}.") from error
    if not isinstance(values, dict):
        raise SearchError(f"{path} must hold names and values, such as 'task:', got {type(values).__name__}.")
    return values
