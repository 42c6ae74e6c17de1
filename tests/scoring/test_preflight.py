"""The difficulty that is chosen, and what a look at the unscaled model refuses; with a model that is a formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_tokenizer import tiny_bpe

from peft_layerrope import KeyValueRetrieval, PositionScores, Split
from peft_layerrope.scoring.generation import Written
from peft_layerrope.scoring.preflight import Preflight, TaskError, find_difficulty
from peft_layerrope.tasks.targets import Target, Targets

GROUPS = 5


class Formula:
    """Answers as large a share of the prompts as a function of their number of pairs says."""

    def __init__(self, share: Callable[[int], float]):
        self._share = share

    def write(self, split: Split) -> list[Written]:
        tokenizer = tiny_bpe()
        pairs = tokenizer.decode(split.examples[0].prompt_ids).count('": "')
        right = round(self._share(pairs) * len(split.examples))
        texts = [example.answers[0] if i < right else "?" for i, example in enumerate(split.examples)]
        return [Written(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), text, False) for text in texts]


def task_of(num_keys: int) -> KeyValueRetrieval:
    return KeyValueRetrieval(tiny_bpe(), num_keys=num_keys, num_positions=3, keys="syllables")


@pytest.mark.parametrize("share", [lambda n: 12 / (n + 6), lambda n: float(n < 10) * 0.8, lambda n: 1.2 - n / 60])
@pytest.mark.parametrize("most", [60, 400])
def test_the_difficulty_leaves_something_to_mend(share, most):
    def bounded(pairs: int) -> float:
        return min(max(share(pairs), 0.0), 1.0)

    curve: dict[int, float] = {}
    found = find_difficulty(Formula(bounded), task_of(most), num_groups=GROUPS, tell=curve.__setitem__)
    assert 0.4 <= curve[found.num_items] <= 0.9
    assert curve[found.num_items] == pytest.approx(bounded(found.num_items), abs=0.5 / (3 * GROUPS) + 1e-9)
    assert len(curve) <= 12


@pytest.mark.parametrize(("share", "words"), [(0.1, "10 % of"), (1.0, "100 % of")])
def test_where_no_difficulty_will_do_the_curve_is_shown(share, words):
    tried = []
    with pytest.raises(TaskError) as caught:
        find_difficulty(
            Formula(lambda n: share), task_of(40), num_groups=10, tell=lambda count, value: tried.append(count)
        )
    assert 1 < len(tried) <= 8
    assert all(f"of {count}" in str(caught.value) for count in tried)
    assert words in str(caught.value)


def looked(correct: np.ndarray, targets: Targets | None) -> Preflight:
    scores = PositionScores((0, 1, 2), correct, np.zeros(correct.shape))
    sample = {"question": "key", "answers": ["gold"], "written": "something else"}
    return Preflight(scores, targets, (sample,), (0.5, 8), None, (1, 2), 0.25)


TASK = SimpleNamespace(item="pair", size_setting="num_keys", num_items=7, size=7)
KNOWN = Targets(' "', {"key": Target((1, 2), (3,))}, 4, 3)


@pytest.mark.parametrize(
    ("right", "targets", "refused"),
    [
        ([0, 0, 0], KNOWN, "something else"),
        ([40, 40, 40], KNOWN, "no lost middle"),
        ([40, 40, 40], None, "something else"),
        ([2, 2, 2], KNOWN, "gold"),
        ([40, 0, 0], KNOWN, None),
        ([40, 38, 40], KNOWN, None),
    ],
)
def test_a_model_that_answers_nothing_or_everything_is_refused(right, targets, refused):
    found = looked(np.arange(40)[:, None] < np.array(right), targets)
    if refused is None:
        found.check(TASK)
        return
    with pytest.raises(TaskError, match=refused) as caught:
        found.check(TASK)
    assert "num_keys is 7" in str(caught.value)


@pytest.mark.parametrize("targets", [KNOWN, None])
def test_what_was_found_comes_back_from_a_file(targets):
    found = looked(np.eye(3, dtype=bool), targets)
    again = Preflight.from_plain(json.loads(json.dumps(found.to_plain(), allow_nan=False)))
    assert again.to_plain() == found.to_plain()
    assert again.targets == targets
    assert "something else" not in json.dumps(again.describe(), allow_nan=False)
