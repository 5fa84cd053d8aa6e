"""The command line: a table of what bad input gets, before any work is done; what modes do."""

import io
import json
import pathlib
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import CONFIG, TINY, load_config

from djepa_jax import main as cli
from djepa_jax.config.convert import flatten
from djepa_jax.modes import Mode
from djepa_jax.runtime import errors
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.training import reporting
from djepa_jax.training.loop import Result

# What is typed, and what the one line of error must name. `tests/config` has the configuration's.
BAD_INPUT = [
    (["--config.optimizer.learning_rat=1e-3"], ["learning_rat", "optimizer.learning_rate"]),
    (["--config.num_steps=many"], ["num_steps", "many"]),
    (["--config.sample.cfg_scale=nan"], ["sample.cfg_scale", "nan"]),
    (["--confg=x"], ["confg"]),
    (["--mode=fly"], ["fly", "train"]),
    (["--workdir=s3://bucket/run"], ["s3://bucket/run", "gs://"]),
    (["--config.evaluation.kind=fid"], ["evaluation.kind", "fid", "small_images"]),
    (["--config.data.source=imagenet"], ["data.source", "imagenet", "digits"]),
    (["--config.data.source=npz", "--config.data.path=/no/such.npz"], ["data.path", "/no/such"]),
    (["--config.data.image_size=16"], ["(8, 8, 1)", "(16, 16, 1)"]),
    (["--config.data.num_classes=5"], ["class 9", "num_classes", "5"]),
    (["--mode=sample", "--restore_from=x@1"], ["--restore_from", "--mode=train"]),
    (["--latents_only"], ["--latents_only", "--mode=sample"]),
    (["--mode=sample", "--latents_only"], ["--latents_only", "leave it out"]),
    (["--mode=export", "--out=x", "--distributed=tpu"], ["one process", "--distributed"]),
    (["--mode=benchmark", "--parts=fly"], ["--parts", "fly", "train"]),
    (["--mode=search", "--config.search.cfg_scale=-1,2"], ["search.cfg_scale", "-1"]),
    (["--mode=search", "--config.search.sampler=ddim"], ["search.sampler", "ddim", "euler, heun"]),
    (["--mode=search", "--config.evaluation.kind=none"], ["evaluation.kind", "classifier"]),
    (["--workdir=runs/back\\slash"], ["back\\slash", "another name"]),
    (["--workdir=\udcff"], ["--workdir", "\\udcff", "UTF-8"]),
    (["--mode=sample", "--out=\udcff.png"], ["--out", "\\udcff", "UTF-8"]),
    (["--mode=benchmark", "--out=/"], ["--out", "is a folder"]),
    (["--mode=benchmark", "--out=new/"], ["--out", "is a folder"]),
    (["--config.mesh=(3,1,1)"], ["mesh", "3", "-1"]),
    (["--config.batch_size=12"], ["batch_size", "12", "8"]),
    (["--config.mesh=(1,8,1)", "--config.model.width=12"], ["mesh", "model.width", "12"]),
]


# What people type, and what its one line of error must name: the remedy.
MISTAKES = [
    ("--config.optimizer.lr=1e-3", "optimizer.learning_rate"),
    ("--config.lr=1e-3", "optimizer.learning_rate"),
    ("--lr=1e-3", "--config.optimizer.learning_rate"),
    ("--learning-rate 1e-3", "--config.optimizer.learning_rate=VALUE"),
    ("--batch_size=64", "--config.batch_size=VALUE"),
    ("--bs=64", "--config.batch_size"),
    ("--config.train.batch_size=64", " batch_size"),
    ("--epochs=10", "--config.num_steps"),
    ("--steps=100", "--config.num_steps"),
    ("--config.num_train_steps=100", " num_steps"),
    ("--config.sample.steps=5", "sample.num_denoise_steps"),
    ("--config.sample_seed=5", "sample.seed"),
    ("--config.num_steps=1.5", "whole number"),
    ("--config.num_steps=1k", "whole number"),
    ("--config.num_steps = 100", "without spaces"),
    ("--config.num_steps", "--config.num_steps=VALUE"),
    ("--config.optimizer.learning_rate=1,5", "a number"),
    ("--config.sample.sampler=ddim", "flow_matching it must be one of euler, heun"),
    ("--config.loss.name=diffusion", "diffusion it must be one of ddpm, ddim"),
    ("--config.loss=diffusion", "config.loss.name"),
    ("--config.ema=0.9", "optimizer.ema_decay"),
    ("--config.optimizer.wd=0", "optimizer.weight_decay"),
    ("--config.sample.guidance=2", "sample.cfg_scale"),
    ("--cfg_scale=2", "--config.sample.cfg_scale"),
    ("--config.sample.temp=1", "sample.temperature"),
    ("--config.model.depth=3", "model.encoder_depth"),
    ("--config.model.dim=3", "model.width"),
    ("--config.resolution=64", "data.image_size"),
    ("--data_dir=x", "--config.data.path"),
    ("--config.dtype=bfloat16", "compute_dtype"),
    ("--config.model.qk_norm=maybe", "true or false"),
    ("--config.mesh=8", "8,1,1"),
    ("--config.search.temperature=0.9;1", "a number"),
    ("--config.sample.labels=12", "0 to 9"),
    ("--config.there_is_no_such_thing=1", "--help=keys"),
    ("--there_is_no_such_thing", "--help"),
    ("--config.data.path=\u201cX\u201d", "printed quotes"),
    ("--Config.seed=3", "--config.seed"),
    ("config.seed=3", "--config.seed=3"),
    ("mode=sample", "--mode=sample"),
    ("train", "--mode=train"),
    ("smaple", "--mode=sample"),
    ("digits", "--config=digits"),
    ("--mode=smaple", "did you mean sample"),
    ("--format=safetensor", "did you mean safetensors"),
    ("--config.sample.labels=apple pear", '"--config.sample.labels=apple pear"'),
    ("--config.sample.labels apple pear", '"--config.sample.labels=apple pear"'),
    ("--workdir=runs/my run", '"--workdir=runs/my run"'),
    ("--config.num_steps= 100", "without spaces"),
    ("--config.num_steps=-5", "config.num_steps is -5"),
    ("--help=key", "--help=keys"),
    ("--help sample", "--help=keys"),
    ("--mode=sample --num_samples=4", "--config.sample.count"),
    ("--output_dir=x", "--workdir"),
    ("--out=x.png", "--mode=sample"),
    ("--source=folder", "--config.data.source"),
    ("--config --workdir=x", "--config=VALUE"),
    ("--config=digit", "did you mean digits"),
    ("--config=djepa-L", "did you mean djepa_l"),
    ("--config=configs/djepa_x.py", "djepa_l"),
    ("--config=runs/x/config.json", "--config_json=runs/x/config.json"),
]
UNDERSTOOD = [  # what is typed, a key, and the value that it has then
    ("--config.num_steps=1e2", "num_steps", 100),
    ("--config.num_steps 1_000", "num_steps", 1000),
    ("-config.num-steps=7", "num_steps", 7),
    ("\u2013config.num_steps=7", "num_steps", 7),
    ("--config.optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
    ("--config.model.qk_norm=no", "model.qk_norm", False),
    ("--config.model.qk_norm=0 --config.model.qk_norm", "model.qk_norm", True),
    ("--config.data.random_flip=Yes", "data.random_flip", True),
    ("--config.mesh=[8,1,1]", "mesh", (8, 1, 1)),
    ("--config.mesh=8,1,1", "mesh", (8, 1, 1)),
    ("--config.data.path=a=b", "data.path", "a=b"),
]


def parse(text: str):
    return cli.parse(["djepa", "--config=digits", "--workdir=runs/x", *text.split()])[1]


@pytest.mark.parametrize(("typed", "remedy"), MISTAKES)
def test_a_typing_mistake_gets_one_line_with_its_remedy(typed, remedy):
    with pytest.raises(errors.UserError) as caught:
        parse(typed)
    assert remedy in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("typed", "key", "value"), UNDERSTOOD)
def test_what_is_meant_is_understood(typed, key, value):
    found = flatten(parse(typed).to_dict())[key]
    assert found == value and type(found) is type(value)


def test_labels_may_be_written_as_a_list():
    plain, *lists = ("3,7", "[3,7]", "(3,7)")
    expected = parse(f"--config.sample.labels={plain}").sample_conditions
    for text in lists:
        assert (parse(f"--config.sample.labels={text}").sample_conditions == expected).all()


def run(*arguments: str) -> int:
    return cli.main(["djepa", *arguments])


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT, ids=lambda value: value[0])
def test_bad_input_is_one_clear_error(arguments, words, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run(f"--config={CONFIG}", f"--workdir={workdir}", *TINY, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error, error
    assert not workdir.exists(), "a refused command must not touch the workdir"


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_required_flags(missing, capsys):
    flags = {"config": f"--config={CONFIG}", "workdir": "--workdir=/tmp/never"}
    del flags[missing]
    assert run(*flags.values()) == 2
    assert f"--{missing} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [(), ("-h",), ("--help",), ("help",), ("--help", "--mode=sample")]
)
def test_help_has_an_example_of_every_mode_and_the_configurations(words, capsys):
    assert run(*words) == 0
    output = capsys.readouterr().out
    assert "digits" in output and "--help=keys" in output
    for name, mode in cli.MODES.items():
        assert f"djepa --mode={name} {mode.example}" in output
        of_workdir = ["--config=digits"] if "config" in mode.needs else []  # as its config.json
        cli.parse(["djepa", f"--mode={name}", *of_workdir, *mode.example.split()])
    for keys in (["--help=keys"], ["--help", "keys"], ["help", "keys"]):
        assert run(*keys) == 0
        assert "sample.cfg_scale = " in capsys.readouterr().out


@pytest.mark.parametrize("module", ["djepa_jax", "djepa_jax.main"])
def test_modules_that_are_commands(module, tmp_path):
    """`python -m` with either name is the command, from anywhere."""
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", module, "--mode=fly"]
    env = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ended.returncode == 2 and "fly" in ended.stderr and "Traceback" not in ended.stderr


def test_home_is_meant_by_a_tilde_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "names").write_text("\n".join("abcdefghij"))
    (tmp_path / "mine.py").write_text(
        "from djepa_jax.config.files import builtin\n\n\ndef get_config():\n"
        '    config = builtin("digits").get_config()\n'
        '    config.prepare.path = "~/photos"\n    return config\n'
    )
    (tmp_path / "mine.json").write_text('{"data.staging": "~/copies"}')
    keys = ("--config.data.path=~/a [1]", "--config.data.class_names=~/names")
    command = ["djepa", "--config=~/mine.py", "--workdir=~/run", *keys]
    for mode, flag in (("sample", "out"), ("import", "source"), ("train", "restore_from")):
        values, experiment = cli.parse([*command, f"--mode={mode}", f"--{flag}=~/given/"])
        assert (values.workdir, values[flag].value) == (f"{tmp_path}/run", f"{tmp_path}/given/")
    assert experiment.data.path == f"{tmp_path}/a [1]"
    assert experiment.prepare.path == f"{tmp_path}/photos"
    assert experiment.class_names == tuple("abcdefghij")
    changed = experiment.updated({"autoencoder.path": "~/kl16"})
    assert changed.autoencoder.path == f"{tmp_path}/kl16"
    _, experiment = cli.parse(["djepa", "--config_json=~/mine.json", "--workdir=x"])
    assert experiment.data.staging == f"{tmp_path}/copies"


def test_any_path_can_be_printed_anywhere(tmp_path, monkeypatch):
    def show(values, experiment):
        """Show."""
        print(values.workdir)

    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setitem(cli.MODES, "train", Mode(show, ("config", "workdir"), ""))
    assert run(f"--config={CONFIG}", f"--workdir={tmp_path}/né") == 0
    printed.seek(0)
    assert printed.read() == f"{tmp_path}/n\\xe9\n"


BROKEN_CONFIGS = {
    "x = 1": "get_config",
    "def get_config():\n    return undefined_name": "undefined_name",
    "def get_config(:": "SyntaxError",
    "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()": "key",
}


@pytest.mark.parametrize("text", BROKEN_CONFIGS)
def test_broken_config_file_is_one_clear_error(text, tmp_path, capsys):
    (tmp_path / "broken.py").write_text(text)
    assert run(f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and BROKEN_CONFIGS[text] in error
    assert "Traceback" not in error and not (tmp_path / "run").exists()


def test_workdir_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("precious")
    assert run(f"--config={CONFIG}", f"--workdir={path}", *TINY) == 2
    assert str(path) in capsys.readouterr().err and path.read_text() == "precious"


def test_second_run_in_a_workdir_is_refused(tmp_path, capsys):
    with lock_workdir(tmp_path):
        assert run(f"--config={CONFIG}", f"--workdir={tmp_path}", *TINY) == 2
    error = capsys.readouterr().err
    assert "in use by process" in error and str(tmp_path) in error


@pytest.mark.parametrize("mode", ["sample", "evaluate", "search"])
def test_missing_checkpoint_is_an_error(mode, tmp_path, capsys):
    assert run(f"--config={CONFIG}", f"--workdir={tmp_path / 'typo'}", f"--mode={mode}", *TINY) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
def test_checkpoint_of_another_model_is_refused(mode, trained, capsys):
    folder = pathlib.Path(trained) / "checkpoints"
    before = sorted(folder.rglob("*"))
    flags = (f"--workdir={trained}", f"--mode={mode}", *TINY)
    assert run(f"--config={CONFIG}", *flags, "--config.model.width=32") == 2
    assert "model.width: 16 -> 32" in capsys.readouterr().err
    assert run(f"--config={CONFIG}:diffusion", *flags) == 2
    assert "loss.name: flow_matching -> diffusion" in capsys.readouterr().err
    assert before == sorted(folder.rglob("*"))


def test_foreign_checkpoint_folder_is_refused(tmp_path, capsys):
    step = tmp_path / "checkpoints" / "5"
    step.mkdir(parents=True)
    (step / "weights.bin").write_bytes(b"something else")
    assert run(f"--config={CONFIG}", f"--workdir={tmp_path}", *TINY) == 2
    assert str(tmp_path / "checkpoints") in capsys.readouterr().err
    assert (step / "weights.bin").read_bytes() == b"something else"


def test_sample_mode_writes_grid_and_arrays(trained, tmp_path, capsys):
    wanted = ["--config.sample.labels=3,7", "--config.sample.count=5"]
    out = tmp_path / "some folder" / "grid.png"
    flags = (f"--config={CONFIG}", f"--workdir={trained}", "--mode=sample", *TINY, *wanted)
    assert run(*flags, f"--out={out}", "--config.sample.cfg_scale=2.0") == 0
    assert str(out) in capsys.readouterr().out
    with np.load(out.with_suffix(".npz"), allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [3, 7, 3, 7, 3]
        assert json.loads(str(arrays["settings"]))["sample"]["cfg_scale"] == 2.0
    with Image.open(out) as grid:
        assert "djepa" in grid.text["command"]
    assert run(*flags, f"--out={tmp_path}/each/", "--config.sample.order=raster") == 0
    names = sorted(path.name for path in (tmp_path / "each").iterdir())
    assert names[:2] == ["000000_3.png", "000001_7.png"]
    assert names[-2:] == ["samples.npz", "samples.png"]


def test_unusable_out_is_refused_before_sampling(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    bucket = "gs://bucket/each/"
    for out in (tmp_path, tmp_path / "file" / "grid.png", tmp_path / "grid.jpg", bucket):
        flags = (f"--config={CONFIG}", f"--workdir={trained}", "--mode=sample", f"--out={out}")
        assert run(*flags, *TINY) == 2
        error = capsys.readouterr().err
        assert f'--out "{bucket if out == bucket else tmp_path}' in error
        assert (".png" in error and ".npz" in error) == ("jpg" in str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_of_others_are_not_replaced(trained, tmp_path, capsys):
    """Whatever mode is given their name; nothing is done before that is said."""
    np.savez(tmp_path / "mine.npz", images=np.zeros((2, 8, 8), np.uint8))
    for name in ("photo.png", "notes.json", "config.json"):
        (tmp_path / name).write_text('{"mine": 1}')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    sample = ("--mode=sample", f"--workdir={trained}")
    for *command, named in (
        (*sample, f"--out={tmp_path}/mine.png", "mine.npz"),
        (*sample, f"--out={tmp_path}/photo", "photo.png"),
        ("--mode=benchmark", f"--out={tmp_path}/notes.json", "notes.json"),
        ("--mode=benchmark", f"--out={tmp_path}/mine.npz", "mine.npz"),
        (f"--workdir={tmp_path}", "config.json"),
    ):
        assert run(f"--config={CONFIG}", *TINY, *command) == 2
        assert f"{tmp_path}/{named}" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_evaluate_mode_writes_its_record(trained, capsys):
    assert run(f"--config={CONFIG}", f"--workdir={trained}", "--mode=evaluate", *TINY) == 0
    record = json.loads((pathlib.Path(trained) / "evaluation.json").read_text())
    assert 0 <= record["metrics"]["accuracy"] <= 1 and record["metrics"]["frechet_distance"] > 0
    assert record["sample"]["num_ar_steps"] == 3 and record["step"] == 3
    assert record["evaluation"]["count"] == 70
    assert "accuracy" in capsys.readouterr().out


def test_finished_run_says_so_and_names_what_to_try(trained, tmp_path, capsys):
    assert run(f"--config={CONFIG}", f"--workdir={trained}", *TINY) == 0
    output = capsys.readouterr().out
    assert "step_00000003.png" in output and "accuracy" in output
    tries = output.partition("):\n")[2].replace("\\\n", " ").splitlines()
    words = shlex.split(tries[0])
    assert len(tries) == 3 and f"--workdir={trained}" in words
    assert run(*words[words.index(f"--workdir={trained}") :], f"--out={tmp_path}/three.png") == 0
    assert (tmp_path / "three.png").exists()


@pytest.mark.parametrize("name", ["digits", "digits:diffusion", "djepa_l"])
def test_what_to_try_is_short_and_can_be_run(name, monkeypatch, capsys):
    monkeypatch.setattr(
        reporting, "program", lambda: ["/home/ada/djepa/.venv/bin/python", "-m", "djepa_jax"]
    )
    reporting.summarise(Result(9, True), load_config(name), "runs/imagenet/large-2")
    tries = capsys.readouterr().out.partition("):\n")[2]
    assert all(len(line) <= 100 for line in tries.splitlines()), tries
    for command in tries.replace("\\\n", " ").splitlines():
        load_config(name, *(word for word in shlex.split(command) if word.startswith("--config.")))


def test_a_workdir_brings_its_configuration(trained, tmp_path, capsys):
    """Values on the command line come on top; a workdir without one needs a --config."""
    for mode in (["--mode=sample"], ["--mode=export", "--out=x"]):
        _, experiment = cli.parse(["djepa", f"--workdir={trained}", *mode, "--config.seed=5"])
        assert experiment == load_config(CONFIG, *TINY, "--config.seed=5")
        assert run(f"--workdir={trained}s", *mode, "--config.seed=5") == 2
        error = capsys.readouterr().err
        assert "does not exist" in error and f"near it are {trained}" in error
    assert run(f"--workdir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert "--config is missing" in error and "does not exist" not in error
    assert list(tmp_path.iterdir()) == []


def test_lost_checkpoints_are_never_a_start_from_scratch(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints")
    assert run(f"--config={CONFIG}", f"--workdir={workdir}", *TINY) == 2
    assert str(workdir / "checkpoints") in capsys.readouterr().err
    assert not (workdir / "checkpoints").exists()


def test_damaged_or_foreign_evaluation_is_made_again(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    path = workdir / "evaluation.json"
    record = json.loads(path.read_text())
    for text in ('{"metrics": 0.', "[]", json.dumps(record | {"ema_norm": 1.0, "metrics": {}})):
        path.write_text(text)
        assert run(f"--config={CONFIG}", f"--workdir={workdir}", *TINY) == 0
        assert json.loads(path.read_text()) == record


# what XLA says -> whether another process is gone
XLA_ERRORS = {
    "UNAVAILABLE: failed to connect to all addresses; last error: UNKNOWN": True,
    "DEADLINE_EXCEEDED: Barrier timed out. Id: compiled.": True,
    "ABORTED: The following tasks are unhealthy: /job:jax_worker/replica:0/task:1": True,
    "FAILED_PRECONDITION: [external/gloo/pair.cc:547] Connection closed by peer": True,
    "INTERNAL: [external/gloo/pair.cc:5] Read error: Connection reset by peer": True,
    "INTERNAL: Task 1 heartbeat timeout": True,
    "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited": True,
    "INVALID_ARGUMENT: Argument does not match host shape, or is UNAVAILABLE": False,
    "INTERNAL: Mosaic failed to compile TPU kernel": False,
    "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes": False,
}


def test_what_xla_says_when_another_process_is_gone():
    for text, is_lost in XLA_ERRORS.items():
        error = jax.errors.JaxRuntimeError(f"{text}\nand more")
        wrapped = TypeError("a mistake in this program")
        wrapped.__context__ = error
        expected = text if is_lost else None
        assert errors.lost(error) == errors.lost(wrapped) == expected


@pytest.mark.parametrize("text", ["UNAVAILABLE: a process is gone", "INTERNAL: Mosaic failed"])
def test_only_a_lost_process_is_told_as_one(text, monkeypatch, capsys, tmp_path):
    """Of several processes; whatever else is wrong comes with its traceback."""

    def fail(values, experiment):
        """Fail."""
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(cli, "_exit_status", lambda status: status)  # it would end this process
    monkeypatch.setitem(cli.MODES, "train", Mode(fail, ("config", "workdir"), ""))
    assert run(f"--config={CONFIG}", f"--workdir={tmp_path}") == 2
    error, lost = capsys.readouterr().err, text.startswith("UNAVAILABLE")
    assert (text in error and "start all of them again" in error) == lost
    assert ("Traceback" in error and "JaxRuntimeError in process 0" in error) != lost


def test_short_memory_is_one_line():
    text = "RESOURCE_EXHAUSTED: out of memory allocating 5 bytes"
    said = errors.expected(jax.errors.JaxRuntimeError(f"{text}\nand a long table"))
    assert text in said and "grad_accumulation_steps" in said and "\n" not in said
    assert errors.expected(jax.errors.JaxRuntimeError("INTERNAL: a mistake")) is None
