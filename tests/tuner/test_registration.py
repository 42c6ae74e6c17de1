"""The enum member behaves like one of PEFT's own; importing the package stays light."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from enum import Enum

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_layerrope.tuner
from peft_layerrope import LayerRopeConfig, LayerRopeModel
from peft_layerrope.tuner.config import LAYER_ROPE, extend_enum


def test_member_behaves_like_an_enum_member():
    assert PeftType("LAYER_ROPE") is PeftType["LAYER_ROPE"] is PeftType.LAYER_ROPE is LAYER_ROPE
    assert LAYER_ROPE in list(PeftType)
    assert isinstance(LAYER_ROPE, PeftType)
    assert (LAYER_ROPE.name, LAYER_ROPE.value, LAYER_ROPE) == ("LAYER_ROPE", "LAYER_ROPE", "LAYER_ROPE")
    assert pickle.loads(pickle.dumps(LAYER_ROPE)) is LAYER_ROPE
    assert copy.deepcopy(LAYER_ROPE) is LAYER_ROPE
    assert json.loads(json.dumps(LAYER_ROPE)) == "LAYER_ROPE"
    assert hash(LAYER_ROPE) == hash(PeftType("LAYER_ROPE"))


class Color(str, Enum):  # noqa: UP042 - as PeftType is declared
    RED = "RED"


def test_extended_enum_equals_one_declared_so():
    added = extend_enum(Color, "BLUE")
    declared = Enum("Declared", {"RED": "RED", "BLUE": "BLUE"}, type=str)
    assert [(m.name, m.value) for m in Color] == [(m.name, m.value) for m in declared]
    assert set(Color.__members__) == set(declared.__members__)
    assert repr(added).removeprefix("<Color") == repr(declared.BLUE).removeprefix("<Declared")
    assert ("BLUE" in Color.__members__, added in Color, Color("BLUE") is added) == (True, True, True)


def test_other_members_are_untouched():
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="NO_SUCH"):
        PeftType("NO_SUCH")


def test_importing_again_changes_nothing():
    before = len(PeftType)
    importlib.reload(peft_layerrope.tuner)
    assert len(PeftType) == before


def test_peft_maps_the_type():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[LAYER_ROPE] is LayerRopeConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[LAYER_ROPE] is LayerRopeModel


@pytest.mark.parametrize("name", ["default", "rope", "layer", "layer_rope", "long-context"])
def test_ordinary_adapter_names_do_not_collide_with_the_prefix(name):
    assert name not in PEFT_TYPE_TO_PREFIX_MAPPING[LAYER_ROPE]


def test_import_is_light():
    code = (
        "import sys, peft_layerrope\n"
        "heavy = {'deap', 'matplotlib', 'scipy.stats', 'typer', 'ray'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    assert all(getattr(peft_layerrope, name) is not None for name in peft_layerrope.__all__)
