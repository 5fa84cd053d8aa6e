"""Finding models on disk: every kind of path, damage that is noticed, and configurations from
before a key existed.
"""

import itertools
import json
import math
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from djepa_jax.checkpoints.integrity import CheckpointError, write_manifest
from djepa_jax.checkpoints.restore import find_model, is_export, placed_params
from djepa_jax.config.stored import ADDED, from_stored
from djepa_jax.core import sharding
from djepa_jax.main import main

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
LOADABLE = ("orbax", "safetensors", "official")


def export(source, out, form: str, *flags: str) -> pathlib.Path:
    arguments = ("--mode=export", f"--workdir={source}", f"--out={out}", f"--format={form}")
    assert main(["djepa_jax", *arguments, *flags]) == 0
    return pathlib.Path(out)


def restore(path, shape=(1, 1, 1)) -> tuple[dict, dict]:
    """Parameters read from `path` onto a mesh, and what was asked for."""
    model = find_model(path)
    mesh = sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])
    abstract = placed_params(model.config, mesh)
    return model.restore(abstract), abstract


@pytest.fixture(scope="module")
def models(trained, tmp_path_factory) -> dict[str, pathlib.Path]:
    """Every place that a model may be in; not to be changed."""
    folder, workdir = tmp_path_factory.mktemp("models"), pathlib.Path(trained)
    steps = workdir / "checkpoints"
    places = {"workdir": workdir, "checkpoints": steps, "step": steps / "3"}
    return places | {form: export(trained, folder / form, form) for form in LOADABLE}


@pytest.fixture
def changed(models, tmp_path):
    """Makes copies that may be changed."""
    return lambda kind: pathlib.Path(shutil.copytree(models[kind], tmp_path / "copy" / kind))


def test_model_is_found(models, trained, monkeypatch):
    stored = json.loads((pathlib.Path(trained) / "config.json").read_text())
    for kind, path in models.items():
        model = find_model(str(path))
        assert model.step == 3 and model.config == from_stored(stored), kind
        assert model.path == (path if kind in LOADABLE else models["step"])
        assert is_export(path) == (kind in LOADABLE)
        monkeypatch.chdir(path.parent)
        assert find_model(path.name).path == model.path


def test_every_source_exports_the_same_tensors(models, tmp_path):
    for kind in ("step", "orbax", "safetensors"):
        folder = export(models[kind], tmp_path / "new" / kind, "official")
        for name in ("model.safetensors", "config.json"):
            assert (folder / name).read_bytes() == (models["official"] / name).read_bytes(), kind


def test_restores_on_any_mesh(models):
    expected, _ = restore(models["workdir"])
    for kind, shape in itertools.product(LOADABLE, [(8, 1, 1), (2, 2, 2)]):
        params, asked = restore(models[kind], shape)
        assert jax.tree.structure(params) == jax.tree.structure(expected)
        leaves = [jax.tree.leaves(tree) for tree in (params, asked, expected)]
        for found, wanted, value in zip(*leaves, strict=True):
            assert found.dtype == value.dtype and found.sharding == wanted.sharding
            assert np.asarray(found).tobytes() == np.asarray(value).tobytes()
        split = [leaf for leaf in leaves[0] if not leaf.sharding.is_fully_replicated]
        assert bool(split) == (shape != (8, 1, 1)), "fsdp and tensor split parameters"


def test_newest_step_is_taken(changed):
    workdir = changed("workdir")
    shutil.copytree(workdir / "checkpoints" / "3", workdir / "checkpoints" / "12")
    assert find_model(workdir).path.name == find_model(workdir / "checkpoints").path.name == "12"
    assert find_model(workdir / "checkpoints" / "3").path.name == "3"


def test_no_model_is_one_clear_error(tmp_path):
    file, folder, unsaved, foreign = (tmp_path / name for name in ("a", "b", "c", "some d"))
    file.write_text("text")
    folder.mkdir()
    (unsaved / "checkpoints").mkdir(parents=True)
    (foreign / "checkpoints" / "5").mkdir(parents=True)
    (foreign / "checkpoints" / "5" / "weights.bin").write_bytes(b"something else")
    for path, words in (
        (tmp_path / "nothing", "does not exist; name a workdir"),
        (file, "is no model; name a workdir"),
        (folder, "is no model; name a workdir"),
        (unsaved, "holds no checkpoint"),
        (foreign, "5 cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            find_model(path)
        assert str(path) in str(caught.value)


def test_reading_writes_nothing(changed):
    workdir = changed("workdir")
    (workdir / "last_saved.json").unlink()
    before = sorted(workdir.rglob("*"))
    restore(workdir)
    assert sorted(workdir.rglob("*")) == before


def test_export_of_another_format_is_refused(changed):
    folder = changed("safetensors")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"format": 2}))
    for _ in range(2):  # with a checksum that is wrong, and right
        with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
            find_model(folder)
        write_manifest(folder)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """All but the card, which people may edit."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")


@pytest.mark.parametrize("kind", LOADABLE)
def test_changed_missing_and_cut_files_are_noticed(models, changed, kind):
    """But not an edited card, and not the card's entry in the manifest."""
    folder, rng, (_, abstract) = changed(kind), random.Random(0), restore(models[kind])
    (folder / "README.md").write_text("# My model\n")
    for path in files_of(folder):
        whole = path.read_bytes()
        flips = 60 if path.suffix == ".json" else 10
        places = {0, len(whole) - 1} | {rng.randrange(len(whole)) for _ in range(flips)}
        changes = [None, b"", whole[: len(whole) // 2], whole + b"\0"]
        for place in places:
            flipped = bytes([whole[place] ^ rng.randrange(1, 256)])
            changes.append(whole[:place] + flipped + whole[place + 1 :])
        for change in changes:
            path.unlink() if change is None else path.write_bytes(change)
            try:
                find_model(folder).restore(abstract)
            except CheckpointError as error:
                assert str(folder) in str(error)
            else:
                found, manifest = json.loads(change)["files"], json.loads(whole)["files"]
                assert found | {"README.md": 0} == manifest | {"README.md": 0}
        path.write_bytes(whole)
    find_model(folder).restore(abstract)


def test_manifest_of_another_kind_is_named(changed):
    folder = changed("safetensors")
    entries = ({}, {"bytes": 1}, None, [], "text")
    kinds = (lambda x: {"files": {"config.json": x}}, lambda x: {"files": x}, lambda x: x)
    for entry, kind in itertools.product(entries, kinds):
        (folder / "manifest.json").write_text(json.dumps(kind(entry)))
        with pytest.raises(CheckpointError, match=r"manifest.json (cannot be read|is not as it)"):
            find_model(folder)


def test_configurations_from_before_a_key_are_completed(tmp_path):
    """In an export and in a step that earlier versions have written."""
    folder = shutil.copytree(FIXTURES / "exported" / "official", tmp_path / "export")
    workdir = shutil.copytree(FIXTURES / "workdirs" / "v2", tmp_path / "run")
    step = workdir / "checkpoints" / "2"
    for path in (folder / "config.json", step / "meta" / "metadata"):
        record = json.loads(path.read_text())
        for group, keys in ADDED.items():
            kept = record["config"].pop(group, {})
            record["config"][group] = {k: v for k, v in kept.items() if k not in keys}
        path.write_text(json.dumps(record))
    write_manifest(folder)
    write_manifest(step)
    for path in (folder, workdir):
        config = find_model(path).config
        for group, keys in ADDED.items():
            assert keys.items() <= config.to_dict()[group].items(), group
        assert config.class_names == tuple(map(str, range(10)))
    restore(folder)
