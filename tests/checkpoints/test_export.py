"""`--mode=export`: what a folder holds, weights that survive every way around, and what is never
overwritten.
"""

import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import stat

import jax
import numpy as np
import pytest
from conftest import PARITY
from filled import save_model
from PIL import Image
from safetensors import safe_open
from tiny import load_config, run, tiny_config

import djepa_jax
from djepa_jax.checkpoints import export as exporting
from djepa_jax.checkpoints.convert.import_weights import run_import
from djepa_jax.checkpoints.export import run_export
from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.checkpoints.model_card import Provenance, model_card, read_provenance
from djepa_jax.checkpoints.restore import StoredModel, find_model, read_record
from djepa_jax.config.convert import ConfigError
from djepa_jax.main import main
from djepa_jax.modes import EXPORT_FORMATS

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "exported"  # by the version before this
SECTIONS = ["Model", "Use", "Data", "Training", "Evaluation", "Licence", "Limits", "Files"]
WEIGHTS = {"orbax": "params", "safetensors": "model.safetensors", "official": "model.safetensors"}


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


def card_of(folder: pathlib.Path) -> dict[str, str]:
    """The sections of a model card by title."""
    parts = re.split(r"^## (.*)\n", (folder / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    return {title: text.strip() for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def assert_same_values(actual: dict, expected: dict):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def exports(trained, tmp_path_factory) -> dict[str, pathlib.Path]:
    """One export of the trained workdir in every format, side by side; not to be changed."""
    folder = tmp_path_factory.mktemp("exports")
    for form in EXPORT_FORMATS:
        flags = (f"--workdir={trained}", f"--out={folder / form}", f"--format={form}")
        assert run("--mode=export", *flags) == 0
    return {form: folder / form for form in EXPORT_FORMATS}


@pytest.fixture
def old(exports, tmp_path) -> pathlib.Path:
    """An export that is there before; the only thing in its parent."""
    return pathlib.Path(shutil.copytree(exports["official"], tmp_path / "place" / "old"))


def refused(old: pathlib.Path, source, out, overwrite=True, error=CheckpointError) -> str:
    """Export, which must fail and leave everything in the folder of `old` as it was; the error."""
    before = contents(old.parent)
    with pytest.raises(error) as caught:
        run_export(None, str(source), str(out), "official", overwrite)
    assert contents(old.parent) == before
    return str(caught.value)


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_folder_holds_weights_record_card_and_manifest(exports, trained, form):
    folder, files = exports[form], contents(exports[form])
    weights = {WEIGHTS[form]} if form in WEIGHTS else {"sampler.stablehlo", "params.npz"}
    described = {"README.md", "config.json", "manifest.json"}
    grid = {"step_00000003.png"}
    assert {path.name for path in folder.iterdir()} == described | weights | grid
    manifest = json.loads(files.pop("manifest.json"))
    expected = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
        if data is not None
    }
    assert manifest == {"files": expected}
    assert {path.name for path in folder.parent.iterdir()} == set(EXPORT_FORMATS)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in folder.glob("*.safetensors"))
    record = json.loads(files["config.json"])
    stored = json.loads((pathlib.Path(trained) / "config.json").read_text())
    assert record["config"] == stored and record["step"] == 3
    assert record["class_names"] == [str(digit) for digit in range(10)]
    assert (record["kind"], record["format"]) == ("djepa_jax export", 1)
    assert record["weights"] == form and ("sampler" in record) == (form == "stablehlo")


def test_card_tells_what_the_weights_are_and_how_to_use_them(exports, trained):
    card, workdir = card_of(exports["official"]), pathlib.Path(trained)
    assert list(card) == SECTIONS
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    for name in ("loss", "token_loss", "jepa_loss", "grad_norm"):
        assert f"{name} {last[name]:.4f}" in card["Training"]
    assert "Step 3, of which 3 here: 16 examples" in card["Training"]
    evaluation = card["Evaluation"].removeprefix("```json").removesuffix("```")
    assert json.loads(evaluation) == json.loads((workdir / "evaluation.json").read_text())
    assert "width 16, 1 + 1 blocks" in card["Model"] and "10 classes" in card["Limits"]
    count = sum(leaf.size for leaf in jax.tree.leaves(djepa_jax.load(trained).params))
    assert f"{count:,} parameters" in card["Model"] and "digits" in card["Data"]
    assert "not stated" in card["Licence"]
    assert all(f"`{digit}`" in card["Data"] for digit in range(10))
    (program,) = re.findall(r"```python\n(.*?)```", card["Use"], flags=re.DOTALL)
    names = {}
    exec(program.replace("PATH OF THIS FOLDER", str(exports["official"])), names)
    assert names["images"].shape == (2, 8, 8, 1) and names["images"].dtype == np.uint8


def test_commands_of_the_card_work(exports, tmp_path, monkeypatch):
    use = card_of(exports["official"])["Use"].replace(
        "PATH OF THIS FOLDER", str(exports["official"])
    )
    (commands,) = re.findall(r"```sh\n(.*?)```", use, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in commands.splitlines():
        program, *words = shlex.split(line)
        assert program == "djepa" and main(["djepa", *words]) == 0
    assert (tmp_path / "samples.png").exists()


def test_the_newest_grid_goes_along_without_paths(trained, exports, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    original = workdir / "samples" / "step_00000003.png"
    for step, text in ((2, None), (9, None), (1, b"damaged")):
        place = original.with_name(f"step_{step:08d}.png")
        place.write_bytes(text or original.read_bytes())
    original.write_bytes(b"damaged")
    run_export(None, str(workdir), str(tmp_path / "one"), "official")
    run_export(None, str(tmp_path / "one"), str(tmp_path / "two"), "official")
    for folder, name in (
        (tmp_path / "one", "step_00000002.png"),
        (tmp_path / "two", "step_00000002.png"),
        (exports["orbax"], "step_00000003.png"),
    ):
        assert [path.name for path in folder.glob("*.png")] == [name]
        assert f"({name})" in (folder / "README.md").read_text()
        with (
            Image.open(folder / name) as copy,
            Image.open(original.with_name("step_00000002.png")) as of,
        ):
            assert not copy.text and of.text["command"]
            np.testing.assert_array_equal(np.asarray(copy), np.asarray(of))
    shutil.rmtree(workdir / "samples")
    bare = run_export(None, str(workdir), str(tmp_path / "three"), "official")
    assert not list(bare.glob("*.png")) and ".png" not in (bare / "README.md").read_text().replace(
        "samples.png", ""
    )


CARDS = {  # settings of a model -> what its card must say, and may not
    "moving_digits": ({}, ["clips = model.sample", "makes clips"], ["images = model"]),
    "digits": (
        {"data.path": "/home/me/secret/pets"},
        ["`pets`", "--init_from="],
        ["secret", "autoencoder", "$"],
    ),
    "djepa_b:pixels": (
        {"data.source": "tfds", "data.path": "mnist:3.0.1@/home/me/secret#test"},
        ["`mnist:3.0.1`", "`tench`", "988 more", "labels=['tench', 'goldfish']"],
        ["secret", "autoencoder="],
    ),
    "djepa_l": (
        {"data.path": "/home/me/secret/cache/"},
        ["`latents` `cache`", "autoencoder=", "--config.autoencoder.path", "divided by 0.2325"],
        ["secret"],
    ),
    "spoken_digits": (
        {"data.path": "/home/me/secret/recordings", "data.num_classes": 10},
        ["sound = model.sample(labels=['0', '1']", "--out=samples.wav", "`recordings`, 10 classes"]
        + ["`AudioMel(rate=8000", "makes sound of 10 classes"],
        ["secret", "images", "8 x 8"],
    ),
    "say_and_draw": (
        {
            "data.source_options.pictures": "/secret/a.npz",
            "data.source_options.sounds": "/secret/b",
        },
        ["pairs = model.sample(labels=[None, None]", "--out=samples/", "`paired` `a.npz` `b`."]
        + ["source_options.pictures=PATH", "makes pairs in", "AudioMel("],
        ["secret", "classes", "data.path"],
    ),
    "emoji": ({"data.path": "/secret/x"}, ['prompts=["a red circle"]'], ["classes", "secret"]),
}


@pytest.mark.parametrize("name", CARDS)
def test_cards_of_many_kinds_of_models(name):
    changes, present, absent = CARDS[name]
    experiment = load_config(name).updated(changes)
    model = StoredModel(GOLDEN, experiment, 5, lambda abstract: {})
    card = model_card(model, experiment, "orbax", Provenance(), "", "")
    for word in present:
        assert word in card, word
    assert not any(word in card for word in absent)


def test_a_record_names_no_places_of_this_machine(tmp_path):
    named = {"pictures": "/secret/a.npz", "sounds": "/secret/b"}
    changes = {f"data.source_options.{key}": value for key, value in named.items()}
    changes |= {"data.staging": "/secret", "evaluation.reference": "/secret/c.npz"}
    experiment = load_config("say_and_draw").updated(changes)
    model = StoredModel(GOLDEN, experiment, 5, lambda abstract: {})
    exporting._describe(tmp_path, model, experiment, "orbax", Provenance(), "")
    assert all(b"secret" not in data for data in contents(tmp_path).values())
    options = read_record(tmp_path)["config"]["data"]["source_options"]
    assert options == experiment.data.source_options | {"pictures": "", "sounds": ""}


def test_a_card_of_one_class_asks_for_that_class():
    changes = {"data.num_classes": 1, "data.unconditional": True}
    experiment = load_config("digits").updated(changes)
    model = StoredModel(GOLDEN, experiment, 5, lambda abstract: {})
    card = model_card(model, experiment, "orbax", Provenance(), "", "user/model")
    assert "labels=['0']," in card and 'load("hf://user/model")' in card


def test_card_leaves_out_an_evaluation_of_anything_else(tmp_path):
    good = {"step": 3, "ema_norm": 5.0, "accuracy": 0.5}
    for record, kept in (
        (good, good),
        (good | {"ema_norm": 5.005}, None),
        (good | {"step": 2}, None),
        ([], None),
        ({"step": 3}, None),
        ("damaged", None),
    ):
        (tmp_path / "evaluation.json").write_text(json.dumps(record)[: None if kept else -1])
        assert read_provenance(tmp_path, 3, 5.0).evaluation == kept
        (tmp_path / "evaluation.json").write_text(json.dumps(record))
        assert read_provenance(tmp_path, 3, 5.0).evaluation == kept


@pytest.mark.parametrize("form", WEIGHTS)
def test_round_trip_through_an_import(trained, exports, tmp_path, form):
    config = tiny_config()
    report = run_import(config, str(tmp_path / "run"), str(exports[form]))
    assert f"moving average: from {exports[form]}" in report
    params = djepa_jax.load(trained).params
    assert_same_values(djepa_jax.load(tmp_path / "run").params, params)
    assert_same_values(djepa_jax.load(exports[form]).params, params)
    again = run_export(None, str(tmp_path / "run"), str(tmp_path / "again"), "official")
    first = (exports["official"] / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == first
    record = json.loads((tmp_path / "run" / "imported.json").read_text())
    assert record["source"] == form
    manifest = (exports[form] / "manifest.json").read_bytes()
    assert record["sha256"] == hashlib.sha256(manifest).hexdigest()
    card = card_of(again)
    assert f"`{form}` at step 0, sha256 `{record['sha256']}`" in card["Training"]
    assert "None of these weights" in card["Evaluation"]


def test_exports_of_the_version_before_are_read_and_written_alike(tmp_path):
    """Every format, its weights byte by byte where there is but one way to write them."""
    params = djepa_jax.load(GOLDEN / "official").params
    for form in WEIGHTS:
        assert_same_values(djepa_jax.load(GOLDEN / form).params, params)
        again = run_export(None, str(GOLDEN / "orbax"), str(tmp_path / form), form)
        assert find_model(again).config == find_model(GOLDEN / form).config
        assert find_model(again).step == find_model(GOLDEN / form).step == 7
        if form != "orbax":
            weights = (GOLDEN / form / "model.safetensors").read_bytes()
            assert (again / "model.safetensors").read_bytes() == weights


def test_official_names_are_the_authors(exports):
    with safe_open(PARITY / "model_flow.safetensors", "np") as file:
        names = file.keys()
        theirs = {name for name in names if "blocks.1." not in name}  # two blocks there, one here
    with safe_open(exports["official"] / "model.safetensors", "np") as file:
        assert set(file.keys()) == theirs and file.metadata() == {"format": "pt"}


def test_the_authors_code_is_not_given_what_it_would_misread(old):
    """Networks that give clean tokens have the shapes of those that give velocities."""
    source = save_model(old.parent / "run", tiny_config("--config.loss.name=x_prediction"))
    assert "x_prediction" in refused(old, source, old) and "safetensors" in refused(
        old, source, old
    )
    assert run_export(None, source, str(old.parent / "new"), "safetensors").exists()


def test_config_may_change_sampling_but_not_the_model(trained, exports, tmp_path):
    changed = ("--config.sample.cfg_scale=3.0", "--config.batch_size=32")
    arguments = (str(trained), str(tmp_path / "out"), "official")
    folder = run_export(tiny_config(*changed), *arguments, licence="CC-BY-4.0")
    assert find_model(folder).config.sample.cfg_scale == 3.0
    assert card_of(folder)["Training"] == card_of(exports["official"])["Training"]
    assert card_of(folder)["Licence"].startswith("Weights: CC-BY-4.0. ")
    with pytest.raises(ConfigError, match=r"model.width: 16 -> 32"):
        run_export(
            tiny_config("--config.model.width=32"), *arguments[:1], str(tmp_path / "no"), "orbax"
        )
    assert not (tmp_path / "no").exists()


def test_export_is_replaced_only_with_overwrite(trained, old, tmp_path):
    error = refused(old, trained, old, overwrite=False)
    assert str(old) in error and "--overwrite" in error
    (old / "surplus").touch()
    (tmp_path / "link").symlink_to(old)
    run_export(None, trained, str(tmp_path / "link"), "safetensors", overwrite=True)
    assert (tmp_path / "link").is_symlink() and read_record(old)["weights"] == "safetensors"
    assert [path.name for path in old.parent.iterdir()] == ["old"]
    assert not (old / "surplus").exists()
    run_export(None, str(old), str(old), "official", overwrite=True)  # the place of its source
    assert [path.name for path in old.parent.iterdir()] == ["old"] and read_record(old)[
        "weights"
    ] == "official"
    assert_same_values(djepa_jax.load(old).params, djepa_jax.load(trained).params)


def test_nothing_but_an_export_is_ever_replaced(trained, old):
    precious, file = old.parent / "precious", old.parent / "file"
    precious.mkdir()
    file.write_text("precious")
    for overwrite in (True, False):
        for record in (
            None,
            '{"num_steps": 3}',
            '{"kind": "other"}',
            "[]",
            "{",
            '"djepa_jax export"',
        ):
            if record is not None:
                (precious / "config.json").write_text(record)
            assert f'--out "{precious}" exists' in refused(old, trained, precious, overwrite)
        assert f'--out "{file}" exists' in refused(old, trained, file, overwrite)
        assert "cannot be written" in refused(old, trained, file / "x", overwrite, ValueError)


def test_unusable_source_is_named(trained, exports, old, tmp_path):
    damaged, empty = (shutil.copytree(trained, tmp_path / name) for name in ("damaged", "empty"))
    for path in damaged.glob("checkpoints/3/state/**/d/*"):
        path.write_bytes(path.read_bytes()[:-40])
    shutil.rmtree(empty / "checkpoints" / "3")
    for source, words in (
        (tmp_path / "typo", "does not exist"),
        (empty, "holds no checkpoint"),
        (damaged, "differs from its checksum"),
        (exports["stablehlo"], "compiled sampler"),
    ):
        for out in (old, old.parent / "new"):
            error = refused(old, source, out)
            assert words in error and str(source) in error


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_in_the_middle_leaves_nothing(trained, old, monkeypatch, failure):
    def fail(path, *_):
        path.write_text("half")
        raise failure

    monkeypatch.setattr(exporting, "save_tensors", fail)
    for out in (old, old.parent / "new"):
        refused(old, trained, out, error=type(failure))


def test_what_does_not_read_back_replaces_nothing(trained, old, monkeypatch):
    def wrong(path, arrays, metadata):
        name = next(name for name in arrays if name.endswith("bias"))
        save_tensors(path, arrays | {name: arrays[name] + 1}, metadata)

    save_tensors = exporting.save_tensors
    monkeypatch.setattr(exporting, "save_tensors", wrong)
    assert "does not read back" in refused(old, trained, old)


def test_what_appears_meanwhile_is_not_replaced(trained, tmp_path, monkeypatch):
    target, save_tensors = tmp_path / "new", exporting.save_tensors

    def save(*arguments):
        save_tensors(*arguments)
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")

    monkeypatch.setattr(exporting, "save_tensors", save)
    with pytest.raises(CheckpointError, match="exists"):
        run_export(None, trained, str(target), "official")
    assert contents(tmp_path) == {"new": None, "new/thesis.txt": b"years of work"}


ODD = "sp ace/né/{x}/#1/a'b\"/a[1]b/**/why?/~/new\nline/%20/s3:"
UNSTORABLE = ("back\\slash", os.fsdecode(b"\xff"), "gs:/x")


def test_odd_names_work_or_are_refused_before_anything_is_done(tmp_path):
    source, params = str(GOLDEN / "official"), djepa_jax.load(GOLDEN / "official").params
    for name in UNSTORABLE:
        with pytest.raises(CheckpointError, match="another name"):
            run_export(None, source, str(tmp_path / name / "out"), "orbax")
        assert contents(tmp_path) == {}
    for form, name in (("orbax", ODD), ("official", f"{ODD}/back\\slash")):
        out = run_export(None, source, str(tmp_path / name / "out"), form)
        assert_same_values(djepa_jax.load(out).params, params)
