"""Exports on the Hugging Face Hub: pushed, fetched, and what is refused before anything is done.

The library talks to a server on this machine where it is installed; a stand-in for the library does
the same where it is not.
"""

import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from fake_hub import FakeHub
from hub_server import TOKEN, HubServer

import djepa_jax
from djepa_jax.checkpoints.export import run_export
from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.checkpoints.restore import find_model
from djepa_jax.main import main

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "exported" / "official"
installed = importlib.util.find_spec("huggingface_hub") is not None
library = pytest.param("library", marks=pytest.mark.skipif(not installed, reason="not installed"))


def forget_the_library(monkeypatch) -> None:
    """It reads the environment when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(params=["stand-in", library])
def hub(request, tmp_path, monkeypatch):
    """The Hub, with somebody logged in."""
    if request.param == "stand-in":
        fake = FakeHub(tmp_path / "cache")
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
        yield fake
        return
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        forget_the_library(monkeypatch)
        yield server
        server.shutdown()


def export(out: pathlib.Path, push: str, form: str = "safetensors", overwrite=False) -> None:
    run_export(None, str(GOLDEN), str(out), form, overwrite, push=push)


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_an_export_is_pushed_and_loaded_and_replaced(hub, tmp_path):
    params = djepa_jax.load(GOLDEN).params
    for form, overwrite in (("orbax", False), ("safetensors", True)):
        export(tmp_path / form, "user/model", form, overwrite)
        held = {k: v for k, v in hub.repos["user/model"].items() if k != ".gitattributes"}
        assert held == files_of(tmp_path / form), "nothing else stays there"
        for address in ("hf://user/model", "hf://user/model@main"):
            model = djepa_jax.load(address)
            assert jax.tree.all(jax.tree.map(np.array_equal, model.params, params))
    assert hub.private == {"user/model"}
    assert 'load("hf://user/model")' in (tmp_path / "orbax" / "README.md").read_text()
    assert find_model("hf://user/model").step == 7


def test_only_an_export_is_replaced_and_only_if_asked(hub, tmp_path):
    hub.repos["user/empty"] = {".gitattributes": b""}
    export(tmp_path / "out", "user/empty")
    hub.repos["user/thesis"] = {"thesis.txt": b"years of work"}
    before = {name: dict(files) for name, files in hub.repos.items()}
    for push, overwrite in (
        ("user/empty", False),
        ("user/thesis", False),
        ("user/thesis", True),
        ("model", True),
        ("../model", True),
    ):
        with pytest.raises(CheckpointError, match="--push"):
            export(tmp_path / "other", push, overwrite=overwrite)
    assert hub.repos == before and not (tmp_path / "other").exists()


def test_what_cannot_be_fetched_is_one_line_with_a_remedy(hub):
    hub.repos["user/thesis"] = {"thesis.txt": b"years of work"}
    for address, words in (
        ("hf://user/typo", "Not Found.*check the name"),
        ("hf://user", "hf://USER/NAME"),
        ("hf://user/thesis", "no model"),
    ):
        with pytest.raises(RuntimeError, match=words) as caught:
            djepa_jax.load(address)
        assert "\n" not in str(caught.value)


def test_whoever_is_not_logged_in_is_told_before_the_export(hub, tmp_path, monkeypatch):
    hub.logged_in = False
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(CheckpointError, match="hf auth login"):
        export(tmp_path / "out", "user/model")
    assert not (tmp_path / "out").exists() and not hub.repos


def test_a_push_that_fails_leaves_the_export(tmp_path, monkeypatch, capsys):
    fake = FakeHub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setattr(fake, "upload_folder", lambda **_: json.loads("{"))
    command = ["djepa", "--mode=export", f"--workdir={GOLDEN}", f"--out={tmp_path}/out"]
    assert main([*command, "--push=user/model", "--format=official"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/out" in error and "--overwrite" in error
    assert find_model(tmp_path / "out").step == 7


def test_without_the_library_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"\[hub\]"):
        djepa_jax.load("hf://user/model")
    with pytest.raises(CheckpointError, match=r"\[hub\]"):
        export(tmp_path / "out", "user/model")
    assert not (tmp_path / "out").exists()
