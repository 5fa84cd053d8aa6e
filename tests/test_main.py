"""The command line: what bad input gets, before any work is done."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from tiny import CONFIG, TINY, load_config

from djepa_jax import main as cli
from djepa_jax.config import experiment as configuration
from djepa_jax.runtime import errors
from djepa_jax.runtime.lock import lock_workdir

# what is typed -> words that the one-line error must contain
BAD_INPUT = {
    "unknown key": (
        ["--config.optimizer.learning_rat=1e-3"],
        ["learning_rat", "optimizer.learning_rate"],
    ),
    "unknown group": (
        ["--config.optimiser.learning_rate=1e-3"],
        ["optimiser.learning_rate", "optimizer.learning_rate"],
    ),
    "unknown top-level key": (["--config.num_step=5"], ["num_step", "num_steps"]),
    "wrong type": (["--config.num_steps=many"], ["num_steps", "many"]),
    "unknown flag": (["--confg=x"], ["confg"]),
    "unknown mode": (["--mode=fly"], ["fly", "train"]),
    "stray word": (["sample"], ["sample", "--flag=VALUE"]),
    "another address as workdir": (
        ["--workdir=s3://bucket/run"],
        ["s3://bucket/run", "neither a local path nor gs://"],
    ),
    "seed below zero": (["--config.seed=-1"], ["config.seed", "-1", "between 0"]),
    "seed too large": (
        ["--config.sample.seed=3000000000"],
        ["sample.seed", "3000000000", "between 0"],
    ),
    "no loss at all": (
        ["--config.loss.token_weight=0", "--config.loss.jepa_weight=0"],
        ["token_weight", "above 0"],
    ),
    "no hidden units": (["--config.model.mlp_ratio=0.001"], ["mlp_ratio", "0.001"]),
    "negative depth": (["--config.model.encoder_depth=-1"], ["encoder_depth", "-1", "at least 0"]),
    "evaluation of one sample": (
        ["--config.evaluation.count=1"],
        ["evaluation.count", "1", "at least 2"],
    ),
    "evaluation of latents": (
        ["--config.data.modality=image_latents"],
        ["evaluation.kind", "small_images", "none"],
    ),
    "unknown loss": (["--config.loss.name=gan"], ["loss.name", "gan", "flow_matching"]),
    "sampler of the other loss": (
        ["--config.sample.sampler=ddpm"],
        ["sample.sampler", "ddpm", "euler"],
    ),
    "unknown size": (["--config.model.size=XL"], ["model.size", "XL", "custom"]),
    "size left out": (["--config.model.width=0"], ["model.width", "custom"]),
    "heads do not divide width": (
        ["--config.model.num_heads=3"],
        ["model.width", "num_heads", "3"],
    ),
    "patch does not divide image": (
        ["--config.data.patch_size=3"],
        ["image_size 8", "patch_size 3"],
    ),
    "mask ratio of zero": (
        ["--config.loss.mask_ratio_min=0.0"],
        ["mask_ratio_min", "0.0", "above 0"],
    ),
    "mask ratio above one": (
        ["--config.loss.mask_ratio_min=1.5"],
        ["mask_ratio_min", "1.5", "at most 1"],
    ),
    "mask group does not divide batch": (["--config.loss.mask_group=7"], ["mask_group", "7"]),
    "no steps": (["--config.num_steps=0"], ["num_steps", "0", "at least 1"]),
    "no AR steps": (["--config.sample.num_ar_steps=0"], ["num_ar_steps", "0", "16"]),
    "more AR steps than tokens": (
        ["--config.sample.num_ar_steps=17"],
        ["num_ar_steps", "17", "16"],
    ),
    "too few denoising steps": (
        ["--config.sample.num_denoise_steps=1"],
        ["num_denoise_steps", "1"],
    ),
    "class too large": (["--config.sample.labels=3,10"], ["sample.labels", "10", "0 to 9"]),
    "class below zero": (["--config.sample.labels=-1"], ["sample.labels", "-1", "0 to 9"]),
    "class by an unknown word": (["--config.sample.labels=seven"], ["sample.labels", "seven"]),
    "cfg is NaN": (["--config.sample.cfg_scale=nan"], ["cfg_scale", "nan", "finite"]),
    "temperature is NaN": (["--config.sample.temperature=nan"], ["temperature", "nan", "finite"]),
    "learning rate is NaN": (["--config.optimizer.learning_rate=nan"], ["learning_rate", "nan"]),
    "unknown source": (["--config.data.source=imagenet"], ["data.source", "imagenet", "digits"]),
    "missing data file": (
        ["--config.data.source=npz", "--config.data.path=/no/such.npz"],
        ["data.path", "/no/such.npz"],
    ),
    "data of another shape": (["--config.data.image_size=16"], ["(8, 8, 1)", "(16, 16, 1)"]),
    "too few classes": (["--config.data.num_classes=5"], ["class 9", "num_classes", "5"]),
    "going back in sampling": (
        ["--mode=sample", "--restore_from=x@1"],
        ["--restore_from", "--mode=train"],
    ),
    "export by many": (
        ["--mode=export", "--out=x", "--distributed=tpu"],
        ["--mode=export", "one process", "--distributed"],
    ),
    "mesh does not fit": (["--config.mesh=(3,1,1)"], ["mesh", "3", "-1"]),
    "batch does not split": (["--config.batch_size=12"], ["batch_size", "12", "8"]),
}


def run(*arguments: str) -> int:
    return cli.main(["djepa_jax", *arguments])


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_error(case, tmp_path, capsys):
    arguments, words = BAD_INPUT[case]
    workdir = tmp_path / "run"
    assert run(f"--config={CONFIG}", f"--workdir={workdir}", *TINY, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    for word in words:
        assert word in error, error
    assert not workdir.exists(), "a refused command must not touch the workdir"


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_required_flags(missing, capsys):
    flags = {"config": f"--config={CONFIG}", "workdir": "--workdir=/tmp/never"}
    del flags[missing]
    assert run(*flags.values()) == 2
    assert f"--{missing} is missing" in capsys.readouterr().err


def test_unknown_config_file_and_variant(tmp_path, capsys):
    assert run("--config=/no/such/config.py", f"--workdir={tmp_path}") == 2
    assert "/no/such/config.py" in capsys.readouterr().err
    assert run(f"--config={CONFIG}:vae", f"--workdir={tmp_path}") == 2
    assert "it has flow and diffusion" in capsys.readouterr().err


def test_workdir_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("precious")
    assert run(f"--config={CONFIG}", f"--workdir={path}", *TINY) == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == "precious"


def test_second_run_in_a_workdir_is_refused(tmp_path, capsys):
    with lock_workdir(tmp_path):
        assert run(f"--config={CONFIG}", f"--workdir={tmp_path}", *TINY) == 2
    error = capsys.readouterr().err
    assert "in use by process" in error and str(tmp_path) in error


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
def test_missing_checkpoint_is_an_error(mode, tmp_path, capsys):
    assert run(f"--config={CONFIG}", f"--workdir={tmp_path / 'typo'}", f"--mode={mode}", *TINY) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
def test_checkpoint_of_another_model_is_refused(mode, trained, capsys):
    before = sorted(
        path for path in pathlib.Path(trained).rglob("*") if "checkpoints" in path.parts
    )
    assert (
        run(
            f"--config={CONFIG}",
            f"--workdir={trained}",
            f"--mode={mode}",
            *TINY,
            "--config.model.width=32",
        )
        == 2
    )
    error = capsys.readouterr().err
    assert "model.width: 16 -> 32" in error
    assert run(f"--config={CONFIG}:diffusion", f"--workdir={trained}", f"--mode={mode}", *TINY) == 2
    assert "loss.name: flow_matching -> diffusion" in capsys.readouterr().err
    assert before == sorted(
        path for path in pathlib.Path(trained).rglob("*") if "checkpoints" in path.parts
    )


def test_foreign_checkpoint_folder_is_refused(tmp_path, capsys):
    step = tmp_path / "checkpoints" / "5"
    step.mkdir(parents=True)
    (step / "weights.bin").write_bytes(b"something else")
    assert run(f"--config={CONFIG}", f"--workdir={tmp_path}", *TINY) == 2
    assert str(tmp_path / "checkpoints") in capsys.readouterr().err
    assert (step / "weights.bin").read_bytes() == b"something else"


def test_sample_mode_writes_grid_and_arrays(trained, tmp_path, capsys):
    from PIL import Image

    flags = [
        "--config.sample.labels=3,7",
        "--config.sample.count=5",
        "--config.sample.cfg_scale=2.0",
    ]
    out = tmp_path / "some folder" / "grid.png"
    assert (
        run(
            f"--config={CONFIG}",
            f"--workdir={trained}",
            "--mode=sample",
            f"--out={out}",
            *TINY,
            *flags,
        )
        == 0
    )
    assert str(out) in capsys.readouterr().out
    with np.load(out.with_suffix(".npz"), allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [3, 7, 3, 7, 3]
        assert json.loads(str(arrays["settings"]))["sample"]["cfg_scale"] == 2.0
    with Image.open(out) as grid:
        assert "djepa_jax.main" in grid.text["command"]


def test_unusable_out_is_refused_before_sampling(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "grid.png"):
        assert (
            run(
                f"--config={CONFIG}", f"--workdir={trained}", "--mode=sample", f"--out={out}", *TINY
            )
            == 2
        )
        assert f'--out "{tmp_path}' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_evaluate_mode_writes_its_record(trained, capsys):
    assert run(f"--config={CONFIG}", f"--workdir={trained}", "--mode=evaluate", *TINY) == 0
    record = json.loads((pathlib.Path(trained) / "evaluation.json").read_text())
    assert 0 <= record["accuracy"] <= 1 and record["frechet_distance"] > 0
    assert (
        record["sample"]["num_ar_steps"] == 3
        and record["evaluation"]["count"] == 70
        and record["step"] == 3
    )
    assert "accuracy" in capsys.readouterr().out


def test_finished_run_says_so_and_names_what_to_try(trained, capsys):
    assert run(f"--config={CONFIG}", f"--workdir={trained}", *TINY) == 0
    output = capsys.readouterr().out
    assert "Training is complete (3 steps)" in output and "start afresh" in output
    assert "step_00000003.png" in output and "accuracy" in output
    assert output.count("-m djepa_jax.main") == 3


@pytest.mark.parametrize("name", ["digits", "digits:diffusion", "djepa_l"])
def test_suggested_commands_are_accepted(name):
    config = load_config(name)
    for extra in cli.next_steps(config):
        overrides = [flag for flag in extra if flag.startswith("--config.")]
        configuration.build(load_config(name, *overrides))


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag, capsys):
    assert run(flag) == 0
    output = capsys.readouterr().out
    assert "usage:" in output and "--workdir" in output and "sample" in output


BROKEN_CONFIGS = {
    "no get_config": ("x = 1", "get_config"),
    "an error in it": ("def get_config():\n    return undefined_name", "undefined_name"),
    "not Python": ("def get_config(:", "SyntaxError"),
    "keys missing": (
        "from ml_collections import ConfigDict\n\ndef get_config():\n    return "
        "ConfigDict({'seed': 1})",
        "lacks a key",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_broken_config_file_is_one_clear_error(case, tmp_path, capsys):
    text, word = BROKEN_CONFIGS[case]
    (tmp_path / "broken.py").write_text(text)
    assert run(f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and word in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_config_file_after_a_space(tmp_path, capsys):
    assert run("--config", CONFIG, f"--workdir={tmp_path / 'run'}", "--config.num_step=3") == 2
    assert "num_step; did you mean num_steps?" in capsys.readouterr().err


def float_keys() -> list[str]:
    flat = configuration.flatten(load_config("digits").to_dict())
    return [key for key, value in flat.items() if isinstance(value, float)]


@pytest.mark.parametrize("key", float_keys())
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1.0"])
def test_no_number_may_be_nan_infinite_or_negative(key, value):
    if (key, value) == ("data.latent_shift", "-1.0"):
        return  # the mean of latents may well be negative
    with pytest.raises(configuration.ConfigError, match=key):
        configuration.build(load_config("digits", f"--config.{key}={value}"))


def test_lost_checkpoints_are_never_a_start_from_scratch(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints")
    assert run(f"--config={CONFIG}", f"--workdir={workdir}", *TINY) == 2
    assert "none can be used" in capsys.readouterr().err and not (workdir / "checkpoints").exists()
    (workdir / "checkpoints").touch()
    assert run(f"--config={CONFIG}", f"--workdir={workdir}", *TINY) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_damaged_or_foreign_evaluation_is_made_again(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    record = json.loads((workdir / "evaluation.json").read_text())
    for text in (
        '{"accuracy": 0.',
        "[]",
        json.dumps(record | {"ema_norm": 1.0, "accuracy": 0.123}),
    ):
        (workdir / "evaluation.json").write_text(text)
        assert run(f"--config={CONFIG}", f"--workdir={workdir}", *TINY) == 0
        assert json.loads((workdir / "evaluation.json").read_text()) == record
    assert capsys.readouterr().out.count("evaluating 70 samples") == 3


# what XLA says -> whether another process is gone
XLA_ERRORS = {
    "UNAVAILABLE: failed to connect to all addresses; last error: UNKNOWN": True,
    "DEADLINE_EXCEEDED: Barrier timed out. Id: compiled. This usually happens because a task did "
    "not come.": True,
    "ABORTED: The following tasks are unhealthy: /job:jax_worker/replica:0/task:1": True,
    "FAILED_PRECONDITION: [external/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
    "[127.0.0.1]:40": True,
    "INTERNAL: [external/gloo/transport/tcp/pair.cc:5] Read error [127.0.0.1]:40: Connection "
    "reset by peer": True,
    "INTERNAL: Task 1 heartbeat timeout": True,
    "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network "
    "error": True,
    "INVALID_ARGUMENT: Argument does not match host shape, or is UNAVAILABLE": False,
    "INTERNAL: Mosaic failed to compile TPU kernel": False,
    "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes": False,
    "INTERNAL: RET_CHECK failure": False,
}


def raised_while(inner: Exception) -> Exception:
    """An error that came up while another one was handled."""
    try:
        try:
            raise inner
        except Exception:
            raise TypeError("a mistake in this program")  # noqa: B904
    except TypeError as error:
        return error


@pytest.mark.parametrize("text", XLA_ERRORS)
@pytest.mark.parametrize("wrap", [lambda error: error, raised_while])
def test_what_xla_says_when_another_process_is_gone(text, wrap):
    error = wrap(jax.errors.JaxRuntimeError(f"{text}\nand more"))
    assert errors.lost(error) == (text if XLA_ERRORS[text] else None)


@pytest.mark.parametrize(
    "text", ["UNAVAILABLE: a process is gone", "INTERNAL: Mosaic failed to compile TPU kernel"]
)
def test_only_a_lost_process_is_told_as_one(text, monkeypatch, capsys, tmp_path):
    """Of several processes; whatever else is wrong comes with its traceback."""

    def fail(values):
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        cli, "_exit_status", lambda status: status
    )  # that of several processes ends this one
    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert run(f"--config={CONFIG}", f"--workdir={tmp_path}") == 2
    error, lost = capsys.readouterr().err, text.startswith("UNAVAILABLE")
    assert (f"error: another process has ended or cannot be reached ({text});" in error) == lost
    assert ("Traceback" in error and "error: JaxRuntimeError in process 0" in error) != lost


def test_short_memory_is_one_line():
    error = jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: out of memory allocating 5 bytes\nand a long table"
    )
    assert errors.expected(error).startswith(
        "the devices' memory is too small (RESOURCE_EXHAUSTED: out of memory allocating 5"
    )
    assert (
        "\n" not in errors.expected(error)
        and errors.expected(jax.errors.JaxRuntimeError("INTERNAL: a mistake")) is None
    )
