"""Finding models on disk: every kind of path, damage that is noticed, and configurations from
before a key existed.
"""

import json
import math
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
from djepa_jax.sampling.sample_to_npz.generator import placed_params
from tiny import CONFIG, TINY

from djepa_jax.checkpoints.integrity import write_manifest
from djepa_jax.checkpoints.orbax_io import CheckpointError
from djepa_jax.checkpoints.stored import find_model, is_export
from djepa_jax.config.experiment import experiment as configuration
from djepa_jax.core import sharding
from djepa_jax.main import main

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


def seal(folder: pathlib.Path):
    """Write the manifest of an export that a test changed."""
    write_manifest(folder)


@pytest.fixture(scope="module")
def models(trained, tmp_path_factory) -> dict[str, pathlib.Path]:
    """Every place that a model may be in; not to be changed."""
    folder, workdir = tmp_path_factory.mktemp("models"), pathlib.Path(trained)
    places = {
        "workdir": workdir,
        "checkpoints": workdir / "checkpoints",
        "step": workdir / "checkpoints" / "3",
    }
    return places | {form: export(trained, folder / form, form) for form in LOADABLE}


@pytest.fixture
def changed(models, tmp_path):
    """Makes copies that may be changed."""
    return lambda kind: pathlib.Path(shutil.copytree(models[kind], tmp_path / "copy" / kind))


@pytest.mark.parametrize("kind", ["workdir", "checkpoints", "step", *LOADABLE])
def test_model_is_found(models, trained, monkeypatch, kind):
    model = find_model(str(models[kind]))
    stored = json.loads((pathlib.Path(trained) / "config.json").read_text())
    assert model.step == 3 and model.config == configuration.upgraded(stored)
    assert model.path == (models["step"] if kind in ("workdir", "checkpoints") else models[kind])
    assert is_export(models[kind]) == (kind in LOADABLE)
    monkeypatch.chdir(models[kind].parent)
    assert find_model(models[kind].name).path == model.path


@pytest.mark.parametrize("kind", ["checkpoints", "step", "orbax", "safetensors"])
def test_every_source_exports_the_same_tensors(models, tmp_path, kind):
    folder = export(models[kind], tmp_path / "new" / "folder", "official")
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (models["official"] / name).read_bytes()


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("kind", LOADABLE)
def test_restores_on_any_mesh(models, kind, shape):
    params, asked = restore(models[kind], shape)
    expected, _ = restore(models["workdir"])
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    leaves = [jax.tree.leaves(tree) for tree in (params, asked, expected)]
    for found, wanted, value in zip(*leaves, strict=True):
        assert (
            found.dtype == value.dtype
            and np.asarray(found).tobytes() == np.asarray(value).tobytes()
        )
        assert found.sharding == wanted.sharding
    split = [leaf for leaf in leaves[0] if not leaf.sharding.is_fully_replicated]
    assert bool(split) == (shape != (8, 1, 1)), "fsdp and tensor split parameters, data does not"


def test_newest_step_is_taken(models, changed):
    workdir = changed("workdir")
    shutil.copytree(workdir / "checkpoints" / "3", workdir / "checkpoints" / "12")
    assert find_model(workdir).path.name == find_model(workdir / "checkpoints").path.name == "12"
    assert find_model(workdir / "checkpoints" / "3").path.name == "3"


def foreign_step(path):
    (path / "checkpoints" / "5").mkdir(parents=True)
    (path / "checkpoints" / "5" / "weights.bin").write_bytes(b"something else")


# what is at the path -> (words that the error must contain, how it comes there)
NO_MODELS = {
    "nothing": ("does not exist; name a workdir", lambda path: None),
    "a file": ("is a file; name a workdir", lambda path: path.write_text("text")),
    "an empty folder": ("is another folder; name a workdir", lambda path: path.mkdir()),
    "a workdir that has not saved": (
        "holds no finished checkpoint yet",
        lambda path: (path / "checkpoints").mkdir(parents=True),
    ),
    "a foreign checkpoint": ("cannot be restored", foreign_step),
}


@pytest.mark.parametrize("case", NO_MODELS)
def test_no_model_is_one_clear_error(tmp_path, case):
    words, make = NO_MODELS[case]
    path = tmp_path / "some folder"
    make(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        find_model(path)
    assert str(path) in str(caught.value)


def test_reading_writes_nothing(changed):
    workdir = changed("workdir")
    (workdir / "last_saved.json").unlink()
    before = sorted(workdir.rglob("*"))
    restore(workdir)
    assert sorted(workdir.rglob("*")) == before


def test_compiled_sampler_is_not_a_model(trained, tmp_path):
    folder = export(
        trained,
        tmp_path / "out",
        "stablehlo",
        f"--config={CONFIG}",
        *TINY,
        "--config.sample.batch_size=1",
    )
    with pytest.raises(
        CheckpointError,
        match=r"out\" holds a compiled sampler \(stablehlo\), .* README.md shows how",
    ):
        find_model(folder)


def test_export_of_another_format_is_refused(changed):
    folder = changed("safetensors")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"format": 2}))
    for _ in range(2):  # with a checksum that is wrong, and right
        with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
            find_model(folder)
        seal(folder)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """All but the card, which people may edit."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")


def test_an_edited_card_does_no_harm(changed):
    folder = changed("safetensors")
    (folder / "README.md").write_text("# My model\n")
    restore(folder)


@pytest.mark.parametrize("kind", LOADABLE)
def test_one_changed_byte_is_noticed(models, changed, kind):
    folder, rng, (_, abstract) = changed(kind), random.Random(0), restore(models[kind])
    for path in files_of(folder):
        whole = path.read_bytes()
        places = {0, len(whole) - 1} | {
            rng.randrange(len(whole)) for _ in range(60 if path.suffix == ".json" else 10)
        }
        for place in sorted(places):
            flipped = bytes([whole[place] ^ rng.randrange(1, 256)])
            path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
            manifest = json.loads(whole) if path.name == "manifest.json" else None
            try:
                find_model(folder).restore(abstract)
            except (
                CheckpointError
            ) as error:  # a damaged manifest may blame the file whose entry is damaged
                assert str(folder if manifest else path) in str(error)
            else:
                found = json.loads(path.read_text())
                for entries in (found["files"], manifest["files"]):
                    entries.pop("README.md", None)
                assert manifest == found, (
                    "only white space and the card's entry may change unnoticed"
                )
        path.write_bytes(whole)
    find_model(folder).restore(abstract)


@pytest.mark.parametrize("kind", LOADABLE)
def test_missing_and_short_files_are_noticed(models, changed, kind):
    folder, (_, abstract) = changed(kind), restore(models[kind])
    for path in files_of(folder):
        whole = path.read_bytes()
        for rest in (None, b"", whole[: len(whole) // 2], whole[:-2], whole + b"\0"):
            path.unlink() if rest is None else path.write_bytes(rest)
            with pytest.raises(CheckpointError) as caught:
                find_model(folder).restore(abstract)
            assert str(path) in str(caught.value)
        path.write_bytes(whole)
    find_model(folder).restore(abstract)


@pytest.mark.parametrize("entry", [{}, {"bytes": 1}, None, [], "text"])
def test_manifest_of_another_kind_is_named(models, changed, entry):
    folder = changed("safetensors")
    for files in ({"files": {"config.json": entry}}, {"files": entry}, entry):
        (folder / "manifest.json").write_text(json.dumps(files))
        with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
            find_model(folder)


def test_configurations_from_before_a_key_are_completed(changed):
    folder, workdir = changed("official"), changed("workdir")
    for path in (folder / "config.json", workdir / "checkpoints" / "3" / "meta" / "metadata"):
        record = json.loads(path.read_text())
        for name in configuration.LATER_KEYS:
            group, _, key = name.rpartition(".")
            (record["config"][group] if group else record["config"]).pop(key, None)
        path.write_text(json.dumps(record))
    seal(folder)
    seal(workdir / "checkpoints" / "3")
    for path in (folder, workdir):
        config = find_model(path).config
        assert (
            config.data.class_names == ""
            and configuration.LATER_KEYS.items() <= configuration.flatten(config).items()
        )
        assert config.class_names == tuple(map(str, range(10)))
    restore(folder)
