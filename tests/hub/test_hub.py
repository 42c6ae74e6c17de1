"""To the Hub and back, by the real client, on a Hub of this process: what goes up, what comes down, how it fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import build_model, logits
from fakes import LEAST_SEARCH
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import LoopbackHub, files_of, loopback_hub
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from reference import hand_patched
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_layerrope import (
    AdapterMismatchError,
    KeyValueWords,
    LayerRopeConfig,
    LayerRopeError,
    pull,
    push_to_hub,
    search,
)
from peft_layerrope.cards import ADAPTER_PLACEHOLDER, BEGIN, model_card, save_card
from peft_layerrope.cli import app
from peft_layerrope.errors import HubError, InvalidConfigError
from peft_layerrope.files import DEMO_NAME, demo_model_path
from peft_layerrope.hub import PULL_RECORD
from peft_layerrope.tuner.artifacts import FACTORS_KEY, save_adapter

FACTORS = [1.0, 1.4, 2.0, 1.2]
OTHER = [1.5, 1.0, 1.0, 3.0]
ALICE, BOB = "hf_alice", "hf_bob"
PUBLISHED = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "search.json",
    "search.yaml",
    "accuracy_by_position.png",
    "factors_by_depth.png",
}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[LoopbackHub]:
    """A Hub with two users, to which this process is logged in as neither."""
    with loopback_hub(alice=ALICE, bob=BOB) as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        # These remember their first endpoint; older versions of transformers use the client's, newer ones their own.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # of the client, between its tries
        huggingface_hub.close_session()  # an earlier test's may hold connections to a Hub that is gone
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def alice(hub, monkeypatch) -> LoopbackHub:
    """The same, logged in."""
    monkeypatch.setenv("HF_TOKEN", ALICE)
    return hub


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter's folder as a search leaves it, with files that are nobody else's business."""
    return make_folder(tmp_path / "adapter")


def make_folder(path: Path, factors: list[float] = FACTORS, base_model: str = "owner/base") -> Path:
    path.mkdir()
    config = LayerRopeConfig(layer_factors=factors, task_type="CAUSAL_LM")
    config.base_model_name_or_path = base_model
    save_adapter(config, path)
    (path / "search.json").write_text(json.dumps({"model": base_model, "task": {"name": "kv_words"}}))
    (path / "search.yaml").write_text(f"# a comment\nmodel: {base_model}\ntask:\n  name: kv_words\n")
    for name in ("accuracy_by_position.png", "factors_by_depth.png"):
        (path / name).write_bytes(b"\x89PNG" + name.encode() + bytes(range(256)))
    save_card(model_card(base_model, config, files=PUBLISHED), path)
    private = ("timing.json", "search.json.partial", ".secret", ".lock", "notes.txt", "adapter_model.bin")
    for junk in (*private, "journal.jsonl", "run/journal.jsonl"):
        (path / junk).parent.mkdir(exist_ok=True)
        (path / junk).write_text("private")
    (path / "run" / "plot.png").write_text("private")
    return path


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    assert isinstance(caught.value, LayerRopeError)
    return text


# up


def test_what_goes_up(alice, folder):
    before = files_of(folder)
    info = push_to_hub(folder, "alice/adapter", commit_message="from a test")
    repo = alice.repos["alice/adapter"]
    assert set(repo.files()) - {".gitattributes"} == PUBLISHED
    assert info.oid == repo.branches["main"]
    assert repo.messages[-1] == "from a test"
    assert files_of(folder) == before
    for name in PUBLISHED - {"README.md"}:
        assert repo.files()[name] == before[name]
    card = repo.files()["README.md"].decode()
    assert ADAPTER_PLACEHOLDER not in card
    assert card.count('adapter = "alice/adapter"') == 4


def test_a_name_without_an_owner_is_ones_own(alice, folder):
    push_to_hub(folder, "adapter")
    assert 'adapter = "alice/adapter"' in alice.repos["alice/adapter"].files()["README.md"].decode()


def test_a_missing_card_is_made(alice, folder):
    (folder / "README.md").unlink()
    push_to_hub(folder, "alice/adapter", license="mit")
    card = ModelCard(alice.repos["alice/adapter"].files()["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("owner/base", "mit", "peft")
    assert "![factor by depth](factors_by_depth.png)" in card.text
    assert not (folder / "README.md").exists()


def test_pushing_the_same_again_changes_nothing(alice, folder):
    first = push_to_hub(folder, "alice/adapter")
    assert push_to_hub(folder, "alice/adapter").oid == first.oid


def test_what_an_earlier_adapters_search_wrote_does_not_stay_beside_another(alice, folder, tmp_path):
    repo = push_to_hub(folder, "alice/adapter").repo_url.repo_id
    before = set(alice.repos[repo].files("main"))
    config = LayerRopeConfig(layer_factors=OTHER, task_type="CAUSAL_LM")
    config.base_model_name_or_path = "owner/base"
    save_adapter(config, tmp_path / "other")
    push_to_hub(tmp_path / "other", "alice/adapter")
    assert "search.json" in before
    kept = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert set(alice.repos[repo].files("main")) == kept | {name for name in before if name.startswith(".git")}


@pytest.mark.parametrize("private", [True, False])
def test_visibility(alice, folder, private):
    push_to_hub(folder, "alice/adapter", private=private)
    assert alice.repos["alice/adapter"].private is private


def test_a_branch_is_made_and_main_stays(alice, folder):
    push_to_hub(folder, "alice/adapter")
    repo = alice.repos["alice/adapter"]
    main = repo.branches["main"]
    other = make_folder(folder.with_name("other"), OTHER)
    for _ in range(2):  # the second time it is there
        push_to_hub(other, "alice/adapter", revision="wide/range")
    assert repo.branches["main"] == main
    assert json.loads(repo.files("wide/range")["adapter_config.json"])["layer_factors"] == OTHER


def test_a_pull_request_to_somebody_elses_repository(alice, folder):
    push_to_hub(folder, "alice/adapter")
    repo = alice.repos["alice/adapter"]
    main = repo.branches["main"]
    other = make_folder(folder.with_name("other"), OTHER)
    info = push_to_hub(other, "alice/adapter", create_pr=True, token=BOB)
    assert repo.branches["main"] == main
    assert info.pr_url == f"{alice.endpoint}/alice/adapter/discussions/1"
    assert json.loads(repo.files(info.pr_revision)["adapter_config.json"])["layer_factors"] == OTHER
    with pytest.raises(RevisionNotFoundError):  # nobody makes branches by the way
        push_to_hub(other, "alice/adapter", create_pr=True, revision="v9", token=BOB)


def test_from_a_peft_model(alice):
    base = build_model("llama")
    base.name_or_path = base.config._name_or_path = "owner/base"
    model = get_peft_model(base, LayerRopeConfig(layer_factors=FACTORS, task_type="CAUSAL_LM"))
    model.add_adapter("wide", LayerRopeConfig(layer_factors=OTHER, task_type="CAUSAL_LM"))
    for name, factors in (("default", FACTORS), ("wide", OTHER)):
        model.set_adapter(name)
        push_to_hub(model, f"alice/{name}")
        files = alice.repos[f"alice/{name}"].files()
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md", ".gitattributes"}
        assert json.loads(files["adapter_config.json"])["layer_factors"] == factors
        assert "More Information Needed" not in files["README.md"].decode()


def test_from_a_search_result(alice, demo_model, demo_tokenizer):
    result = search(demo_model, KeyValueWords(demo_tokenizer, 64, num_positions=3), progress=False, **LEAST_SEARCH)
    result.push_to_hub("alice/adapter")
    files = alice.repos["alice/adapter"].files()
    assert set(files) - {".gitattributes"} == PUBLISHED - {"search.yaml"} | {"gain_over_harm.png"}
    assert ModelCard(files["README.md"].decode()).data.base_model == DEMO_NAME


# no path of this machine goes up


@pytest.fixture
def local_folder(tmp_path) -> Path:
    """An adapter of a model in a folder, whose search was told of a data file."""
    base = tmp_path / "models" / "my-model"
    folder = make_folder(tmp_path / "local", base_model=str(base))
    values = {"model": str(base), "task": {"name": "kv_retrieval", "data": str(tmp_path / "data" / "kv.jsonl.gz")}}
    (folder / "search.yaml").write_text("# a comment\n" + yaml.safe_dump(values))
    (folder / "search.json").write_text(json.dumps({"model": "my-model", "task": values["task"]}))
    get_peft_model(build_model("llama"), LayerRopeConfig(layer_factors=FACTORS)).create_or_update_model_card(folder)
    card = ModelCard.load(folder / "README.md")
    card.data.base_model, card.data.tags = str(base), [f"base_model:adapter:{base}", "mine"]  # as PEFT would
    card.save(folder / "README.md")
    return folder


def test_a_base_model_known_by_its_path_is_refused(alice, local_folder):
    with pytest.raises(InvalidConfigError, match=r"is no id owner/name .* pass base_model") as caught:
        push_to_hub(local_folder, "alice/adapter")
    one_line(caught)
    assert alice.requests == []


def test_a_base_model_without_an_owner_must_be_meant(alice, tmp_path):
    """It may be what a search left of a path."""
    folder = make_folder(tmp_path / "bare", base_model="my-model")
    with pytest.raises(InvalidConfigError, match=r"'my-model' .* is no id owner/name") as caught:
        push_to_hub(folder, "alice/adapter")
    one_line(caught)
    assert alice.requests == []
    push_to_hub(folder, "alice/adapter", base_model="my-model")


def test_paths_stay_here(alice, local_folder, tmp_path):
    push_to_hub(local_folder, "alice/adapter", base_model="owner/base")
    files = alice.repos["alice/adapter"].files()
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    assert json.loads(files["search.json"])["model"] == "owner/base"
    assert files["search.yaml"].startswith(b"# a comment\n")
    task = {"name": "kv_retrieval", "data": "kv.jsonl.gz"}
    assert yaml.safe_load(files["search.yaml"]) == {"model": "owner/base", "task": task}
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "owner/base"
    assert card.text.count('base = "owner/base"') == 4
    assert "my-model" not in card.content
    assert "mine" in card.data.tags
    assert "layer-rope" in card.data.tags


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_link_is_not_followed(alice, folder, tmp_path, name):
    """It may lead to something private."""
    (folder / name).rename(tmp_path / "private")
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(InvalidConfigError, match=f"{name} must be a file .* no link") as caught:
        push_to_hub(folder, "alice/adapter")
    one_line(caught)
    assert alice.requests == []


def test_other_pictures_stay_here(alice, folder):
    (folder / "holiday.png").write_bytes(b"\x89PNG")
    push_to_hub(folder, "alice/adapter")
    assert "holiday.png" not in alice.repos["alice/adapter"].files()


@pytest.mark.parametrize(
    "path",
    [
        "clients/acme/secret/mails.jsonl",
        "file:///home/me/secret/mails.jsonl",
        "$HOME/secret/mails.jsonl",
        "${HOME}/secret/mails.jsonl",
        r"%USERPROFILE%\secret\mails.jsonl",
        "~/secret/mails.jsonl",
        "datasets:/home/me/secret/mails.jsonl",
    ],
)
def test_of_a_data_file_the_name_alone_goes_up(alice, folder, path):
    task = {"name": "kv_retrieval", "data": path, "system_prompt": "/no_think"}
    values = {"model": "owner/base", "task": task, "search": {"text": path}}
    (folder / "search.yaml").write_text(yaml.safe_dump(values))
    (folder / "search.json").write_text(json.dumps({**values, "bound": {"text": path}}))
    push_to_hub(folder, "alice/adapter")
    files = alice.repos["alice/adapter"].files()
    public = "datasets:mails.jsonl" if path.startswith("datasets:") else "mails.jsonl"
    for found in (yaml.safe_load(files["search.yaml"]), json.loads(files["search.json"])):
        assert found["task"] == {**task, "data": public}
        assert found["search"]["text"] == public
        assert found["model"] == "owner/base"
    assert b"secret" not in files["search.json"]


def test_the_name_of_a_base_model_that_is_code_is_refused(alice, tmp_path):
    folder = make_folder(tmp_path / "evil", base_model='x"\nimport os\n<script>')
    with pytest.raises(InvalidConfigError) as caught:
        push_to_hub(folder, "alice/adapter")
    one_line(caught)


def test_the_demo_model_has_a_name(alice, tmp_path):
    push_to_hub(make_folder(tmp_path / "demo", base_model=demo_model_path()), "alice/adapter")
    files = alice.repos["alice/adapter"].files()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == DEMO_NAME
    assert yaml.safe_load(files["search.yaml"])["model"] == DEMO_NAME


# the card that is there


def edit_on_the_hub(hub: LoopbackHub, extra: str) -> None:
    repo = hub.repos["alice/adapter"]
    card = repo.files()["README.md"].decode().replace("library_name: peft", "library_name: peft\nlicense: mit")
    repo.commit("main", {"README.md": (card + extra).encode()})


def test_words_written_on_the_hub_stay(alice, folder):
    push_to_hub(folder, "alice/adapter")
    edit_on_the_hub(alice, "\n## Written on the Hub\n")
    other = make_folder(folder.with_name("other"), OTHER)
    push_to_hub(other, "alice/adapter")
    card = ModelCard(alice.repos["alice/adapter"].files()["README.md"].decode())
    assert "## Written on the Hub" in card.text
    assert "1.5 1 1 3" in card.text
    assert card.text.count(BEGIN) == 1
    assert card.data.license == "mit"


def test_words_written_here_are_newer(alice, folder):
    push_to_hub(folder, "alice/adapter")
    edit_on_the_hub(alice, "\n## Written on the Hub\n")
    path = folder / "README.md"
    path.write_text(path.read_text() + "\n## Written here\n")
    push_to_hub(folder, "alice/adapter")
    text = alice.repos["alice/adapter"].files()["README.md"].decode()
    assert "## Written here" in text
    assert "## Written on the Hub" not in text


def test_a_card_on_the_hub_that_cannot_be_read_is_not_replaced(alice, folder):
    push_to_hub(folder, "alice/adapter")
    repo = alice.repos["alice/adapter"]
    broken = repo.commit("main", {"README.md": b"---\na: [\n---\nmine"})
    with pytest.raises(InvalidConfigError) as caught:
        push_to_hub(folder, "alice/adapter")
    one_line(caught)
    assert repo.branches["main"] == broken


# what is refused before anything is sent


def spoil_tensor(folder: Path) -> None:
    save_file({FACTORS_KEY: torch.tensor(OTHER)}, folder / "adapter_model.safetensors")


def spoil_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def make_it_a_lora(folder: Path) -> None:
    get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)


def forget_the_base(folder: Path) -> None:
    save_adapter(LayerRopeConfig(layer_factors=FACTORS), folder)


SPOILERS = {
    "tensor": (spoil_tensor, AdapterMismatchError, "disagree on 4 of 4"),
    "no tensor": (lambda folder: (folder / "adapter_model.safetensors").unlink(), LayerRopeError, "no such file"),
    "config": (spoil_config, LayerRopeError, "not JSON"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), LayerRopeError, "no adapter_config.json"),
    "lora": (make_it_a_lora, LayerRopeError, "is a LORA adapter, expected LAYER_ROPE"),
    "no base": (forget_the_base, InvalidConfigError, "pass base_model"),
    "report": (lambda folder: (folder / "search.json").write_text("["), InvalidConfigError, "search.json"),
    "yaml": (lambda folder: (folder / "search.yaml").write_text("- a"), InvalidConfigError, "search.yaml"),
    "card": (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), InvalidConfigError, "README.md"),
}


@pytest.mark.parametrize("what", SPOILERS)
def test_a_bad_folder_never_leaves(alice, folder, what):
    spoil, kind, message = SPOILERS[what]
    spoil(folder)
    with pytest.raises(kind, match=message) as caught:
        push_to_hub(folder, "alice/adapter")
    one_line(caught)
    assert alice.requests == []


def test_no_such_folder(alice, tmp_path):
    with pytest.raises(LayerRopeError) as caught:
        push_to_hub(tmp_path / "nothing", "alice/adapter")
    one_line(caught)


@pytest.mark.parametrize("repo_id", ["a/b/c", "with space/x", "", "-x/y", "a/b--c", "/some/where"])
def test_invalid_ids(hub, folder, tmp_path, repo_id):
    for call in (lambda: push_to_hub(folder, repo_id), lambda: pull(repo_id, tmp_path / "new")):
        with pytest.raises(InvalidConfigError, match="is no id of the Hub, such as owner/name") as caught:
            call()
        one_line(caught)
    assert hub.requests == []


# who may what


def test_pushing_without_a_login(hub, folder):
    with pytest.raises(LocalTokenNotFoundError):
        push_to_hub(folder, "alice/adapter")
    assert hub.requests == []
    assert "hf auth login" in refused("push", str(folder), "alice/adapter")


def test_pushing_with_a_token_that_the_hub_does_not_know(hub, folder, monkeypatch):
    with pytest.raises(HfHubHTTPError):
        push_to_hub(folder, "alice/adapter", token="hf_stale")
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    assert "hf auth login" in refused("push", str(folder), "alice/adapter")
    assert hub.repos == {}


def test_pushing_to_somebody_elses_name(alice, folder):
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        push_to_hub(folder, "bob/adapter")
    alice.create("bob/adapter")
    with pytest.raises(HfHubHTTPError, match="rights to write"):
        push_to_hub(folder, "bob/adapter")
    assert "rights to write" in refused("push", str(folder), "bob/adapter")
    assert set(alice.repos["bob/adapter"].files()) == {".gitattributes"}


@pytest.mark.parametrize("token", [None, BOB])
def test_a_private_repository_is_as_good_as_none(hub, folder, tmp_path, token):
    push_to_hub(folder, "alice/adapter", private=True, token=ALICE)
    for repo_id in ("alice/adapter", "alice/nothing"):
        with pytest.raises(RepositoryNotFoundError):
            pull(repo_id, tmp_path / "new", token=token)
    message = refused("pull", "alice/nothing", str(tmp_path / "new"))
    assert "alice/nothing" in message
    assert "hf auth login" in message
    assert pull("alice/adapter", tmp_path / "mine", token=ALICE).is_dir()


def test_a_gated_repository(hub, tmp_path):
    hub.create("alice/adapter")
    hub.fail("/api/models/alice/adapter", 403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(GatedRepoError):
        pull("alice/adapter", tmp_path / "new")


def test_a_401_without_a_code(hub, tmp_path):
    """Older answers of the Hub to strangers."""
    hub.fail("/api/models/alice/adapter", 401)
    assert "hf auth login" in refused("pull", "alice/adapter", str(tmp_path / "new"))


# connections


def test_offline(alice, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: push_to_hub(folder, "alice/adapter"), lambda: pull("alice/adapter", tmp_path / "new")):
        with pytest.raises(OfflineModeIsEnabled):
            call()
    assert "HF_HUB_OFFLINE" in refused("pull", "alice/adapter", str(tmp_path / "new"))


def test_no_hub_there(alice, folder, tmp_path, monkeypatch):
    with loopback_hub() as gone:
        endpoint = gone.endpoint
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for call in (lambda: push_to_hub(folder, "alice/adapter"), lambda: pull("alice/adapter", tmp_path / "new")):
        with pytest.raises(HTTPError):
            call()
    assert "the Hub" in refused("pull", "alice/adapter", str(tmp_path / "new"))


def test_an_upload_is_tried_again(alice, folder):
    alice.fail("/preupload/", 503, times=2)
    push_to_hub(folder, "alice/adapter")
    assert sum("/preupload/" in path for _, path, _ in alice.requests) == 3
    assert set(alice.repos["alice/adapter"].files()) > PUBLISHED


def test_a_hub_that_stays_down(alice, folder, tmp_path):
    alice.fail("/api/", 503, times=1000)
    for call in (lambda: push_to_hub(folder, "alice/adapter"), lambda: pull("alice/adapter", tmp_path / "new")):
        with pytest.raises(HfHubHTTPError, match="503"):
            call()
    assert "503" in refused("push", str(folder), "alice/adapter")
    assert not (tmp_path / "new").exists()


# down


@pytest.fixture
def published(alice, folder) -> LoopbackHub:
    """A Hub with `alice/adapter`: FACTORS on main, OTHER on the branch v2."""
    push_to_hub(folder, "alice/adapter")
    push_to_hub(make_folder(folder.with_name("other"), OTHER), "alice/adapter", revision="v2")
    alice.requests.clear()
    return alice


def factors_in(folder: Path) -> list[float]:
    return json.loads((folder / "adapter_config.json").read_text())["layer_factors"]


def test_what_comes_down(published, tmp_path, ids):
    repo = published.repos["alice/adapter"]
    repo.commit("main", {"adapter_model.bin": b"pickle", "code.py": b"evil", "timing.json": b"{}"})
    target = tmp_path / "deep" / "down"
    assert pull("alice/adapter", target) == target
    assert {str(path.relative_to(target)) for path in target.rglob("*")} == PUBLISHED | {PULL_RECORD}
    for name in PUBLISHED:
        assert (target / name).read_bytes() == repo.files()[name]
    model = PeftModel.from_pretrained(build_model("llama"), target)
    assert torch.allclose(logits(model, ids), logits(hand_patched(build_model("llama"), FACTORS), ids), atol=1e-5)
    assert [path.name for path in target.parent.iterdir()] == ["down"]


@pytest.mark.parametrize("kind", ["branch", "commit"])
def test_a_revision(published, tmp_path, kind):
    revision = "v2" if kind == "branch" else published.repos["alice/adapter"].branches["v2"]
    assert factors_in(pull("alice/adapter", tmp_path / "new", revision)) == OTHER


def test_a_revision_that_is_not_there(published, tmp_path):
    with pytest.raises(RevisionNotFoundError):
        pull("alice/adapter", tmp_path / "new", "v9")
    assert "v9" in refused("pull", "alice/adapter", str(tmp_path / "new"), "--revision", "v9")


def test_a_broken_connection_is_resumed(published, tmp_path, monkeypatch):
    """From the byte where it broke: by the client, or with an older client by the next pull."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16)
    published.cut("adapter_model.safetensors")
    if Version(huggingface_hub.__version__) < Version("1.20"):
        with pytest.raises(HTTPError, match="without sending complete message body"):
            pull("alice/adapter", tmp_path / "new")
    assert factors_in(pull("alice/adapter", tmp_path / "new")) == FACTORS
    ranges = [r for _, path, r in published.requests if path.endswith("adapter_model.safetensors") and r is not None]
    assert len(ranges) == 1
    assert int(re.fullmatch(r"bytes=(\d+)-", ranges[0])[1]) > 0


@pytest.mark.parametrize("broken", ["adapter_config.json", "adapter_model.safetensors", "factors_by_depth.png"])
def test_an_interrupted_pull_leaves_nothing(published, tmp_path, broken):
    target = tmp_path / "new"
    published.cut(broken, times=100)
    with pytest.raises((HTTPError, OSError)):
        pull("alice/adapter", target)
    assert not target.exists()
    refused("pull", "alice/adapter", str(target))
    published.faults.clear()
    before = published.downloads("adapter_config.json")
    assert factors_in(pull("alice/adapter", target)) == FACTORS
    if broken != "adapter_config.json":  # what was there already is not fetched again
        assert published.downloads("adapter_config.json") == before
    assert list(tmp_path.glob(".new*")) == []


def test_an_interrupted_pull_leaves_the_earlier_one(published, tmp_path):
    target = pull("alice/adapter", tmp_path / "new")
    before = files_of(target)
    published.cut("adapter_model.safetensors", times=100)
    with pytest.raises((HTTPError, OSError)):
        pull("alice/adapter", target, "v2")
    assert files_of(target) == before
    published.faults.clear()
    pull("alice/adapter", target)  # of another commit after all: nothing is left of the one given up
    assert files_of(target) == before
    assert list(tmp_path.glob(".new*")) == []


def test_pulling_again(published, tmp_path):
    target = pull("alice/adapter", tmp_path / "new")
    published.repos["alice/adapter"].commit("main", {"factors_by_depth.png": None})
    assert factors_in(pull("alice/adapter", target, "v2")) == OTHER
    assert factors_in(pull("alice/adapter", target)) == FACTORS
    assert not (target / "factors_by_depth.png").exists()


SPOILED = {
    "changed": lambda target: (target / "README.md").write_text("mine"),
    "no record": lambda target: (target / PULL_RECORD).unlink(),
    "bad record": lambda target: (target / PULL_RECORD).write_text("[]"),
    "other record": lambda target: (target / PULL_RECORD).write_text('{"repo_id": "alice/adapter", "sha256": 1}'),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_a_pull_could_not_bring_back_is_not_replaced(published, tmp_path, what):
    target = pull("alice/adapter", tmp_path / "new")
    SPOILED[what](target)
    before = files_of(target)
    with pytest.raises(InvalidConfigError, match=r"README\.md") as caught:
        pull("alice/adapter", target, "v2")
    assert "overwrite replaces them" in one_line(caught)
    assert files_of(target) == before
    assert factors_in(pull("alice/adapter", target, "v2", overwrite=True)) == OTHER


def test_what_is_not_ours_stays(published, tmp_path, monkeypatch):
    """And what of ours is missing comes back."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    pull("alice/adapter", ".")
    (tmp_path / "search.yaml").unlink()
    for overwrite in (False, True):
        pull("alice/adapter", ".", "v2", overwrite=overwrite)
        assert factors_in(tmp_path) == OTHER
        assert (tmp_path / "search.yaml").is_file()
        assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_pull_that_was_killed_while_it_replaced_is_overcome(published, tmp_path):
    target = pull("alice/adapter", tmp_path / "new")
    (target / "adapter_config.json").unlink()
    (target / "result.partial").mkdir()
    (target / "result.partial" / "adapter_config.json").write_text("{")
    assert factors_in(pull("alice/adapter", target)) == FACTORS
    assert {path.name for path in target.iterdir()} == PUBLISHED | {PULL_RECORD}


@pytest.mark.parametrize(("commit", "overwrite"), [("main", False), ("main", True), ("v2", False), ("v2", True)])
def test_a_pull_may_be_killed_at_any_file_that_it_replaces(published, tmp_path, monkeypatch, commit, overwrite):
    """The commit that was there before, or another one. The next pull of it ends as if nothing had happened."""
    expected = files_of(pull("alice/adapter", tmp_path / "expected", commit))
    for step in range(len(expected) + 1):  # the record is written twice
        target, replaced = pull("alice/adapter", tmp_path / f"{step}"), []

        def replace(source: Path, place: Path, step: int = step, replaced: list = replaced) -> None:
            replaced.append(place)
            if len(replaced) > step:
                raise KeyboardInterrupt
            os.rename(source, place)

        with monkeypatch.context() as patched:
            patched.setattr("peft_layerrope.files.os.replace", replace)
            patched.setattr("peft_layerrope.files.shutil.rmtree", lambda *_, **__: None)  # who is killed tidies nothing
            with pytest.raises(KeyboardInterrupt):
                pull("alice/adapter", target, commit, overwrite=True)
        assert (target / "result.partial").is_dir()
        pull("alice/adapter", target, commit, overwrite=overwrite)
        assert files_of(target) == expected


def test_a_file_with_the_content_of_another_one_was_changed(published, tmp_path):
    target = pull("alice/adapter", tmp_path / "new")
    (target / "search.json").write_bytes((target / "README.md").read_bytes())
    with pytest.raises(InvalidConfigError, match=r"search\.json"):
        pull("alice/adapter", target)


def test_what_cannot_be_replaced(published, folder, tmp_path):
    push_to_hub(folder, "alice/second")
    target = pull("alice/adapter", tmp_path / "new")
    with pytest.raises(InvalidConfigError, match="not from a pull of 'alice/second'"):
        pull("alice/second", target)
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"cannot be written: .*{tmp_path / 'file'}"):
            pull("alice/adapter", place, overwrite=True)


BAD_REPOSITORIES = {
    "empty": ({"adapter_config.json": None}, HubError, "has no adapter_config.json"),
    "lora": (
        {"adapter_config.json": b'{"peft_type": "LORA"}'},
        LayerRopeError,
        "is a LORA adapter, expected LAYER_ROPE",
    ),
    "not json": ({"adapter_config.json": b"<html>"}, LayerRopeError, "is not JSON"),
    "too deep": (
        {"adapter_config.json": b'{"peft_type": "LAYER_ROPE", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"},
        LayerRopeError,
        "adapter_config.json",
    ),
    "escapes": (
        {"adapter_config.json": b'{"peft_type": "\\u001b]0;owned\\u0007"}'},
        LayerRopeError,
        r"'\\x1b\]0;owned\\x07'",
    ),
    "large config": ({"adapter_config.json": b" " * 2**21}, HubError, "no adapter_config.json of at most"),
    "large tensor": ({"adapter_model.safetensors": b" " * 2**21}, HubError, "no adapter_model.safetensors of at most"),
    "large card": ({"README.md": b" " * 2**21}, HubError, "no README.md of at most"),
    "no tensor": ({"adapter_model.safetensors": None}, HubError, "has no adapter_model.safetensors"),
    "bad tensor": ({"adapter_model.safetensors": b"\x80\x04pickle"}, AdapterMismatchError, "not a safetensors file"),
    "bad factors": (
        {"adapter_config.json": b'{"peft_type": "LAYER_ROPE", "layer_factors": [-1, 1, 1, 1]}'},
        LayerRopeError,
        r"layer_factors\[0\]",
    ),
    "no factors": (
        {"adapter_config.json": b'{"peft_type": "LAYER_ROPE"}'},
        AdapterMismatchError,
        "has no layer_factors",
    ),
    "other factors": (
        {"adapter_config.json": b'{"peft_type": "LAYER_ROPE", "layer_factors": [1, 1, 1, 1]}'},
        AdapterMismatchError,
        "disagree on 3 of 4",
    ),
}


@pytest.mark.parametrize("what", BAD_REPOSITORIES)
def test_a_bad_repository(published, tmp_path, what):
    changes, kind, message = BAD_REPOSITORIES[what]
    published.repos["alice/adapter"].commit("main", changes)
    with pytest.raises(kind, match=message) as caught:
        pull("alice/adapter", tmp_path / "new")
    assert one_line(caught).isprintable()
    assert not (tmp_path / "new").exists()
    for name, content in changes.items():
        if content is not None and len(content) > 2**20:
            assert published.downloads(name) == 0
    if "tensor" not in what and what not in ("large card", "bad factors", "no factors", "other factors"):
        assert published.downloads("adapter_model.safetensors") == 0


# with PEFT


def test_pushed_then_loaded_in_a_second_process_over_a_lora(alice, tmp_path, long_ids):
    build_model("llama").save_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    trained.save_pretrained(tmp_path / "lora")
    wanted = hand_patched(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), FACTORS)
    wanted = PeftModel.from_pretrained(wanted, tmp_path / "lora")
    save_file({"ids": long_ids, "logits": logits(wanted.eval(), long_ids)}, tmp_path / "wanted.safetensors")
    rope = LayerRopeConfig(layer_factors=FACTORS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rope)
    push_to_hub(model, "alice/adapter", private=True, base_model="owner/base")
    code = """
import sys, torch, peft_layerrope
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
wanted = load_file(folder + "/wanted.safetensors")
model = AutoModelForCausalLM.from_pretrained(folder + "/base")
model = PeftModel.from_pretrained(model, folder + "/lora")
model = PeftModel.from_pretrained(model, "alice/adapter").eval()
with torch.no_grad():
    torch.testing.assert_close(model(wanted["ids"]).logits, wanted["logits"], atol=1e-4, rtol=1e-4)
"""
    settings = {"HF_ENDPOINT": alice.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr


def test_pefts_own_push_uploads_an_adapter_that_loads(alice, tmp_path, ids):
    """Its card is the empty template, and the base model's path goes up with it; ours puts both right."""
    build_model("llama").save_pretrained(tmp_path / "base")
    rope = LayerRopeConfig(layer_factors=FACTORS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rope)
    model.push_to_hub("alice/adapter")
    loaded = PeftModel.from_pretrained(build_model("llama"), pull("alice/adapter", tmp_path / "new"))
    assert torch.equal(logits(loaded, ids), logits(model.eval(), ids))
    push_to_hub(model, "alice/adapter", base_model="owner/base")
    files = alice.repos["alice/adapter"].files()
    assert all(str(tmp_path).encode() not in content for content in files.values())
    assert "More Information Needed" not in files["README.md"].decode()
    model.push_to_hub("alice/adapter")  # and where our card is there, PEFT's push leaves it
    assert alice.repos["alice/adapter"].files()["README.md"] == files["README.md"]


# the command line


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def refused(*arguments: str) -> str:
    """What a command says in its one line when it fails."""
    status, text = run(*arguments)
    assert status == 1
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1, text
    return text


def test_commands(alice, folder, tmp_path):
    status, text = run("push", str(folder), "alice/adapter", "--private", "--commit-message", "by command")
    assert (status, text.strip()) == (
        0,
        f"{alice.endpoint}/alice/adapter/commit/{alice.repos['alice/adapter'].branches['main']}",
    )
    assert alice.repos["alice/adapter"].private
    assert alice.repos["alice/adapter"].messages[-1] == "by command"
    other = make_folder(tmp_path / "other", OTHER)
    assert run("push", str(other), "alice/adapter", "--revision", "v2")[0] == 0
    status, text = run("push", str(other), "alice/adapter", "--create-pr", "--license", "mit")
    assert text.strip() == f"{alice.endpoint}/alice/adapter/discussions/1"
    target = str(tmp_path / "new")
    assert run("pull", "alice/adapter", target)[0] == 0
    assert run("pull", "alice/adapter", target, "--revision", "v2")[0] == 0
    assert factors_in(Path(target)) == OTHER
    (Path(target) / "README.md").write_text("mine")
    status, text = run("pull", "alice/adapter", target)
    assert status == 2
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1
    assert run("pull", "alice/adapter", target, "--overwrite")[0] == 0
    assert factors_in(Path(target)) == FACTORS


@pytest.mark.parametrize("command", ["push", "pull"])
def test_help_teaches_with_an_example(command):
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, "--help")[1])
    assert f"Example: layerrope {command}" in text
    assert "--token" not in text
