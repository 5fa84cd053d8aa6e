"""`--mode=export`: what a folder holds, weights that survive every way around, and what is never
overwritten.
"""

import hashlib
import json
import pathlib
import re
import shutil
import stat

import jax
import numpy as np
import pytest
from conftest import PARITY
from safetensors import safe_open
from tiny import CONFIG, TINY

import djepa_jax
from djepa_jax import main as cli
from djepa_jax.checkpoints import export as exporting
from djepa_jax.checkpoints.restore import find_model, read_record
from djepa_jax.config.experiment import upgraded
from djepa_jax.main import main

WEIGHTS = {"orbax": "params", "safetensors": "model.safetensors", "official": "model.safetensors"}


def run(*arguments: str) -> int:
    return cli.main(["djepa_jax", *arguments])


def export(source, out, form: str, *flags: str) -> pathlib.Path:
    assert (
        run("--mode=export", f"--workdir={source}", f"--out={out}", f"--format={form}", *flags) == 0
    )
    return pathlib.Path(out)


def contents(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file()
    }


def card_of(folder) -> dict[str, str]:
    """The sections of a model card by title."""
    parts = re.split(r"^## (.*)\n", (folder / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    assert parts[0] == "# D-JEPA model\n\n"
    return {title: text.strip() for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def assert_same_values(actual: dict, expected: dict):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def exports(trained, tmp_path_factory) -> dict[str, pathlib.Path]:
    """One export of the trained workdir in every format, side by side; not to be changed."""
    folder = tmp_path_factory.mktemp("exports")
    return {form: export(trained, folder / form, form) for form in exporting.FORMATS}


@pytest.fixture(scope="module")
def imported(exports, tmp_path_factory) -> dict[str, pathlib.Path]:
    """A workdir made by `--mode=import` of each export that can be loaded; not to be changed."""
    folder = tmp_path_factory.mktemp("imported")
    for form in WEIGHTS:
        flags = (f"--source={exports[form]}", f"--config={CONFIG}", *TINY)
        assert run("--mode=import", f"--workdir={folder / form}", *flags) == 0
    return {form: folder / form for form in WEIGHTS}


@pytest.fixture
def workdir(trained, tmp_path) -> pathlib.Path:
    """A copy of the trained workdir that may be changed."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("form", exporting.FORMATS)
def test_files_and_manifest(exports, form):
    folder, files = exports[form], contents(exports[form])
    described = {"README.md", "config.json", "manifest.json"}
    weights = {WEIGHTS[form]} if form in WEIGHTS else {"sampler.stablehlo", "params.npz"}
    assert {path.name for path in folder.iterdir()} == described | weights
    manifest = json.loads(files.pop("manifest.json"))
    expected = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    assert manifest == {"files": expected}
    assert {path.name for path in folder.parent.iterdir()} == set(cli.EXPORT_FORMATS), (
        "nothing is left beside the exports"
    )
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("form", exporting.FORMATS)
def test_record_carries_the_configuration(exports, trained, form):
    record = json.loads((exports[form] / "config.json").read_text())
    assert record["config"] == upgraded(
        json.loads((pathlib.Path(trained) / "config.json").read_text())
    )
    assert record["class_names"] == [str(digit) for digit in range(10)] and record["step"] == 3
    assert (
        record["kind"] == "djepa_jax export" and record["format"] == 1 and record["weights"] == form
    )
    assert ("sampler" in record) == (form == "stablehlo")


@pytest.mark.parametrize("form", exporting.FORMATS)
def test_card_tells_where_the_weights_come_from(exports, trained, form):
    card = card_of(exports[form])
    assert list(card) == [
        "Model",
        "Use",
        "Data",
        "Training",
        "Evaluation",
        "Licence",
        "Limits",
        "Files",
    ]
    lines = [
        json.loads(line)
        for line in (pathlib.Path(trained) / "metrics.jsonl").read_text().splitlines()
    ]
    last = [line for line in lines if "loss" in line][-1]
    assert last["step"] == 3
    figures = ", ".join(
        f"{name} {last[name]:.4f}" for name in ("loss", "token_loss", "jepa_loss", "grad_norm")
    )
    assert (
        f"At step 3: {figures}." in card["Training"]
        and "3 steps of 16 examples here" in card["Training"]
    )
    record = json.loads((pathlib.Path(trained) / "evaluation.json").read_text())
    assert re.search(
        f"{record['accuracy']:.3f} .* {record['frechet_distance']:.3f}. Both over 70 samples",
        card["Evaluation"],
    )
    assert (
        json.loads(card["Evaluation"].split("```json\n")[1].removesuffix("```")) == record["sample"]
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(djepa_jax.load(trained).params))
    assert (
        f"{count:,} parameters (width 16, 1 + 1 blocks" in card["Model"]
        and "digits" in card["Data"]
    )
    assert "whoever trained the model decides" in card["Licence"] and "10 classes" in card["Limits"]


def test_licence_is_the_one_given(trained, tmp_path):
    card = card_of(export(trained, tmp_path / "out", "official", "--license=CC-BY-4.0"))
    assert card["Licence"] == "Weights: CC-BY-4.0. Code: Apache-2.0."


OTHER_RECORDS = {
    "other weights": lambda record: record | {"ema_norm": record["ema_norm"] * 1.001},
    "another step": lambda record: record | {"step": 2},
    "a list": lambda record: [],
    "nothing": lambda record: {},
    "something else": lambda record: {"step": 3},
}


@pytest.mark.parametrize("case", OTHER_RECORDS)
def test_card_leaves_out_an_evaluation_of_anything_else(workdir, tmp_path, case):
    record = json.loads((workdir / "evaluation.json").read_text())
    (workdir / "evaluation.json").write_text(json.dumps(OTHER_RECORDS[case](record)))
    card = card_of(export(workdir, tmp_path / "out", "official"))
    assert card["Evaluation"] == "No evaluation of these weights was recorded."


def test_card_of_imported_weights_names_the_file(imported, tmp_path):
    record = json.loads((imported["official"] / "imported.json").read_text())
    card = card_of(export(imported["official"], tmp_path / "out", "safetensors"))
    source = f"`model.safetensors` (sha256 `{record['sha256']}`) on {record['imported']}."
    assert card["Training"] == f"Weights imported at step 0 from {source}"
    assert "whoever made the imported file decides" in card["Licence"]
    assert card["Evaluation"] == "No evaluation of these weights was recorded."


def test_config_may_change_sampling_but_not_the_model(trained, exports, tmp_path, capsys):
    others = (
        "--config.sample.cfg_scale=3.0",
        "--config.batch_size=32",
        "--config.optimizer.learning_rate=0.5",
    )
    folder = export(trained, tmp_path / "out", "official", f"--config={CONFIG}", *TINY, *others)
    assert find_model(folder).config.sample.cfg_scale == 3.0
    assert card_of(folder)["Training"] == card_of(exports["official"])["Training"]
    arguments = (
        "--mode=export",
        f"--workdir={trained}",
        f"--out={tmp_path / 'no'}",
        f"--config={CONFIG}",
        *TINY,
    )
    assert run(*arguments, "--config.model.width=32") == 2
    assert "model.width: 16 -> 32" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("form", WEIGHTS)
def test_round_trip_through_an_import(trained, exports, imported, tmp_path, form):
    assert_same_values(djepa_jax.load(imported[form]).params, djepa_jax.load(trained).params)
    again = export(imported[form], tmp_path / "again", "official")
    assert (again / "model.safetensors").read_bytes() == (
        exports["official"] / "model.safetensors"
    ).read_bytes()


def test_official_names_are_the_authors(exports):
    with safe_open(PARITY / "model_flow.safetensors", "np") as file:
        theirs = {name for name in file.keys() if "blocks.1." not in name}  # noqa: SIM118 (two blocks there, one here)
    with safe_open(exports["official"] / "model.safetensors", "np") as file:
        assert set(file.keys()) == theirs and file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("form", WEIGHTS)
def test_use_of_the_card_works(exports, form):
    (block,) = re.findall(r"```python\n(.*?)```", card_of(exports[form])["Use"], flags=re.DOTALL)
    names = {}
    exec(block.replace("PATH OF THIS FOLDER", str(exports[form])), names)
    assert names["images"].shape == (2, 8, 8, 1) and names["images"].dtype == np.uint8


@pytest.fixture
def old(exports, tmp_path) -> pathlib.Path:
    """An export that is there before; the only thing in its parent."""
    return pathlib.Path(shutil.copytree(exports["official"], tmp_path / "place" / "old"))


def failed(capsys, old, *flags: str, status: int = 2) -> str:
    """Run an export that must fail and leave everything in `old`, and beside it, as it was; returns
    the message.
    """
    before, names = contents(old.parent), sorted(old.parent.rglob("*"))
    assert run("--mode=export", "--format=official", *flags) == status
    assert contents(old.parent) == before and sorted(old.parent.rglob("*")) == names
    error = capsys.readouterr().err
    assert (
        error.startswith("error: " if status == 2 else "interrupted") and "Traceback" not in error
    )
    return error


def test_export_is_replaced_only_with_overwrite(trained, old, capsys):
    assert "--out is missing" in failed(capsys, old, f"--workdir={trained}", "--overwrite")
    error = failed(capsys, old, f"--workdir={trained}", f"--out={old}")
    assert f'--out "{old}" exists; name another folder, or add --overwrite' in error
    (old / "surplus").touch()
    export(trained, old, "safetensors", "--overwrite")
    assert [path.name for path in old.parent.iterdir()] == ["old"] and not (
        old / "surplus"
    ).exists()
    assert read_record(old)["weights"] == "safetensors"
    export(old, old, "official", "--overwrite")  # an export may take the place of its source
    assert [path.name for path in old.parent.iterdir()] == ["old"] and read_record(old)[
        "weights"
    ] == "official"
    assert_same_values(djepa_jax.load(old).params, djepa_jax.load(trained).params)


def test_link_to_an_export_is_followed(trained, old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    export(trained, link, "safetensors", "--overwrite")
    assert link.is_symlink() and read_record(old)["weights"] == "safetensors"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "place"} and [
        p.name for p in old.parent.iterdir()
    ] == ["old"]


@pytest.mark.parametrize("flag", ["--overwrite", "--nooverwrite"])
@pytest.mark.parametrize(
    "record", [None, '{"num_steps": 3}', '{"kind": "other"}', "[]", "{", '"djepa_jax export"']
)
def test_nothing_but_an_export_is_ever_replaced(trained, old, capsys, flag, record):
    precious, file = old.parent / "precious", old.parent / "file"
    precious.mkdir()
    file.write_text("precious")
    if record is not None:
        (precious / "config.json").write_text(record)
    for out, word in (
        (precious, "exists"),
        (file, "exists"),
        (file / "below", "cannot be written"),
    ):
        error = failed(capsys, old, f"--workdir={trained}", f"--out={out}", flag)
        assert word in error and f'--out "{file if out == file / "below" else out}"' in error


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # from Orbax's reader threads
@pytest.mark.parametrize("kind", ["missing", "empty", "damaged", "sampler"])
def test_unusable_source(workdir, exports, old, capsys, kind):
    if kind == "damaged":
        for path in workdir.glob("checkpoints/3/state/**/d/*"):
            path.write_bytes(path.read_bytes()[:-40])
    elif kind == "empty":
        shutil.rmtree(workdir / "checkpoints" / "3")
    source = {"missing": workdir / "typo", "sampler": exports["stablehlo"]}.get(kind, workdir)
    words = {
        "missing": "does not exist",
        "empty": "holds no checkpoint",
        "damaged": "differs from its checksum",
        "sampler": "compiled sampler",
    }
    for out, flag in ((old, "--overwrite"), (old.parent / "new", "--nooverwrite")):
        assert words[kind] in failed(capsys, old, f"--workdir={source}", f"--out={out}", flag)


@pytest.mark.parametrize(
    "failure, status", [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)]
)
def test_failure_in_the_middle_leaves_nothing(trained, old, monkeypatch, capsys, failure, status):
    def fail(job, folder):
        (folder / "half").write_text("written")
        raise failure

    monkeypatch.setitem(exporting.WRITERS, "official", fail)
    failed(capsys, old, f"--workdir={trained}", f"--out={old}", "--overwrite", status=status)
    failed(capsys, old, f"--workdir={trained}", f"--out={old.parent / 'new'}", status=status)


def test_what_appears_meanwhile_is_not_replaced(trained, tmp_path, monkeypatch, capsys):
    target = tmp_path / "new"
    original = exporting.WRITERS["official"]

    def write(job, folder):
        original(job, folder)
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")

    monkeypatch.setitem(exporting.WRITERS, "official", write)
    assert (
        main(
            [
                "djepa_jax",
                "--mode=export",
                "--format=official",
                f"--workdir={trained}",
                f"--out={target}",
            ]
        )
        == 2
    )
    assert "exists; name another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and [
        path.name for path in target.iterdir()
    ] == ["thesis.txt"]


def test_places_on_this_machine_stay_here(exports):
    for folder in exports.values():
        config = json.loads((folder / "config.json").read_text())["config"]
        assert (
            config["data"]["path"]
            == config["prepare"]["path"]
            == config["autoencoder"]["path"]
            == ""
        )
