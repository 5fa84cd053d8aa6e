"""`--config_json`: a configuration as data. What is laid over the defaults, and what is refused in
one line.
"""

import json
import os
import pathlib
import sys

import pytest
from tiny import CONFIG, load_config, tiny_config

from djepa_jax import main as cli
from djepa_jax.checkpoints.restore import KIND
from djepa_jax.config import experiment as configuration
from djepa_jax.config import json_config
from djepa_jax.config.experiment import ConfigError
from djepa_jax.training import benchmark

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def write(tmp_path):
    """Write a JSON file of values, or of text as it is; returns its path."""

    def write(content) -> str:
        path = tmp_path / "some config.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)

    return write


def load(path: str, *extra: str):
    return cli.parse(["djepa_jax", f"--config_json={path}", "--workdir=unused", *extra]).config


# what a file may say


def test_the_empty_object_is_the_default_configuration(write):
    assert load(write({})).to_dict() == load_config("default").to_dict()


def test_named_keys_are_laid_over_the_defaults(write):
    values = {
        "seed": 7,
        "model": {"size": "B", "qk_norm": False},
        "mesh": [2, 1, -1],
        "sample.count": 3,
        "loss": {},
    }
    config = load(
        write(values),
        "--config.model.size=H",
        "--config.mesh=(4,1,1)",
        "--noconfig.data.random_flip",
    )
    expected = load_config(
        "default", "--config.seed=7", "--config.model.size=H", "--config.sample.count=3"
    )
    expected.model.qk_norm, expected.mesh = False, (4, 1, 1)
    assert config.to_dict() == expected.to_dict() and isinstance(config.mesh, tuple)
    assert load(write(values)).mesh == (2, 1, -1) and load(write(values)).model.size == "B"


def test_whole_numbers_do_for_other_numbers(write):
    config = load(write({"sample": {"cfg_scale": 2}}), "--config.sample.temperature=1")
    assert (config.sample.cfg_scale, config.sample.temperature) == (2.0, 1.0)
    assert type(config.sample.cfg_scale) is float
    assert (
        load(write({"sample": {"cfg_scale": 2}}), "--config.sample.cfg_scale=1.5").sample.cfg_scale
        == 1.5
    )


def test_result_is_locked(write):
    with pytest.raises(AttributeError):
        load(write({})).no_such_key = 1


@pytest.mark.parametrize(
    "start", ["--config_json=", "-config_json=", "--config-json=", "--config_json"]
)
def test_ways_to_write_the_flag(write, start):
    path = write({"seed": 5})
    words = [start + path] if start.endswith("=") else [start, path]
    for argv in (
        ["--config.batch_size=8", "--workdir", "unused", *words],
        [*words, "--workdir=unused"],
    ):
        assert cli.parse(["djepa_jax", *argv]).config.seed == 5


# stored configurations


@pytest.mark.parametrize(
    "name",
    ["digits", "digits:diffusion", "djepa_b", "djepa_h:unconditional+pixels", "djepa_l:no_jepa"],
)
def test_stored_configuration_is_the_same_again(write, name):
    config = load_config(name)
    assert load(write(configuration.resolved(config))).to_dict() == config.to_dict()


def test_size_of_a_stored_configuration_can_be_changed(write):
    stored = configuration.resolved(load_config("djepa_b", "--config.model.encoder_depth=3"))
    size = configuration.resolve_size(load(write(stored), "--config.model.size=L").model)
    assert size["width"] == 1024 and size["encoder_depth"] == 3


def test_older_stored_configuration_means_what_was_done_then(write):
    then = load_config("digits", "--config.microbatches=1")  # there was no other way
    stored = configuration.resolved(then)
    del stored["data"]["class_names"], stored["microbatches"], stored["autoencoder"]
    assert load(write(stored)).to_dict() == then.to_dict()


def test_record_of_an_export_will_do(write):
    stored = configuration.resolved(tiny_config("--config.seed=9"))
    assert load(write({"kind": KIND, "format": 1, "step": 3, "config": stored})).seed == 9


def test_stored_class_names_are_a_list_and_can_be_replaced(write, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    stored = configuration.resolved(
        tiny_config(f"--config.data.class_names={tmp_path / 'names.txt'}")
    )
    config = load(write(stored))
    assert configuration.build(config).class_names == tuple(NAMES)
    assert configuration.resolved(config) == stored
    assert load(write(stored), "--config.data.class_names=").data.class_names == ""


def test_workdir_of_a_run_goes_on_from_its_own_configuration(write, tmp_path):
    """What the checkpoint is compared with is the same, whichever way the configuration was
    given.
    """
    config = tiny_config()
    again = load(write(configuration.resolved(config)))
    assert (
        configuration.differences(configuration.resolved(config), configuration.resolved(again))
        == []
    )


# what is refused


BAD_FILES = {
    "not JSON": (b"seed = 1", ["it is not JSON", "line 1"]),
    "empty": (b"", ["it is not JSON"]),
    "a Python config": (pathlib.Path(CONFIG).read_bytes(), ["it is not JSON"]),
    "no text": (b"\xff\xfe{}", ["it is not JSON"]),
    "a list": ([1], ["it holds a list; it must hold an object"]),
    "a number": (1, ["it holds 1; it must hold an object"]),
    "an export without one": ({"kind": KIND, "config": "no"}, ['it holds "no"']),
    "unknown key": ({"num_step": 5}, ['unknown config key "num_step"; did you mean num_steps?']),
    "unknown nested key": (
        {"optimizer": {"learning_rat": 1}},
        ["optimizer.learning_rat", "did you mean optimizer.learning_rate?"],
    ),
    "unknown group": (
        {"optimiser": {"learning_rate": 1}},
        ["optimiser.learning_rate", "did you mean optimizer.learning_rate?"],
    ),
    "unknown empty group": ({"optimiser": {}}, ["optimiser"]),
    "key with a line break": ({"a\nb": 1}, ["a\\nb"]),
    "key of a megabyte": ({"a" * 500_000: 1}, ["aaa..."]),
    "text for a whole number": (
        {"num_steps": "abc"},
        ['num_steps is "abc"; it must be a whole number'],
    ),
    "fraction for a whole number": (
        {"num_steps": 2.5},
        ["num_steps is 2.5; it must be a whole number"],
    ),
    "truth for a whole number": (
        {"num_steps": True},
        ["num_steps is true; it must be a whole number"],
    ),
    "truth for a number": (
        {"sample": {"cfg_scale": True}},
        ["sample.cfg_scale is true; it must be a finite number"],
    ),
    "number for truth": (
        {"model": {"qk_norm": 1}},
        ["model.qk_norm is 1; it must be true or false"],
    ),
    "number for text": ({"data": {"path": 3}}, ["data.path is 3; it must be text"]),
    "list for a number": ({"seed": [1]}, ["seed is a list; it must be a whole number"]),
    "object for a number": ({"seed": {"a": 1}}, ["seed.a"]),
    "empty object for a number": ({"seed": {}}, ["seed is an object; it must be a whole number"]),
    "nothing": ({"seed": None}, ["seed is null; it must be a whole number"]),
    "number for a group": ({"loss": 3}, ["loss is 3; it must be an object of keys"]),
    "text for a mesh": ({"mesh": "1,1,1"}, ["mesh", "a list of whole numbers"]),
    "fractions in a mesh": ({"mesh": [1, 1.5, 1]}, ["mesh", "a list of whole numbers"]),
    "nested mesh": ({"mesh": [[1], 1, 1]}, ["mesh", "a list of whole numbers"]),
    "empty mesh": ({"mesh": []}, ["mesh", "a list of whole numbers"]),
    "numbers as names": (
        {"data": {"class_names": ["a", 1]}},
        ["data.class_names is a list; it must be text"],
    ),
    "derived key that is no truth": ({"loss": {"jepa_weight above 0": 1}}, ["true or false"]),
    "huge whole number": (
        b'{"num_steps": ' + b"9" * 400 + b"}",
        ["num_steps is 999", "a whole number"],
    ),
    "huge number": (b'{"sample": {"cfg_scale": ' + b"9" * 400 + b"}}", ["a finite number"]),
    "more digits than Python reads": (b'{"num_steps": ' + b"9" * 5000 + b"}", ["digits"]),
    "NaN": (b'{"sample": {"cfg_scale": NaN}}', ["NaN is not a number in JSON"]),
    "infinity": (b'{"sample": {"cfg_scale": -Infinity}}', ["-Infinity is not a number in JSON"]),
    "infinity in digits": (b'{"sample": {"cfg_scale": 1e999}}', ["cfg_scale", "a finite number"]),
    "key twice": (b'{"seed": 1, "seed": 1}', ['"seed" is given twice']),
    "nested key twice": (
        b'{"loss": {"name": "diffusion", "name": "diffusion"}}',
        ['"name" is given twice'],
    ),
    "key in two ways": (
        b'{"loss": {"name": "diffusion"}, "loss.name": "diffusion"}',
        ['"loss.name" is given twice'],
    ),
    "deep lists": (b'{"seed": ' + b"[" * 100_000, ["nested too deeply"]),
    "deep objects": (b'{"seed":' * 100_000 + b"1" + b"}" * 100_000, ["nested too deeply"]),
    "deep but whole": (b'{"seed": ' + b"[" * 500 + b"]" * 500 + b"}", ["seed is a list"]),
    "too large": (b'{"seed": 1}' + b" " * 2**20, ["it has more than 1,048,576 bytes"]),
    "value that cannot work": ({"num_steps": 0}, ["config.num_steps is 0; it must be at least 1"]),
}


def refused(tmp_path, capsys, *arguments: str) -> str:
    """Train, which must fail with one line and touch nothing; the line."""
    assert cli.main(["djepa_jax", f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("error: ")
        and len(captured.err.splitlines()) == 1
        and not captured.out
    ), captured.err
    assert len(captured.err) < 600 and not (tmp_path / "run").exists()
    return captured.err


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_clear_error(case, write, tmp_path, capsys):
    content, words = BAD_FILES[case]
    error = refused(tmp_path, capsys, f"--config_json={write(content)}")
    assert "some config.json" in error or "config." in error
    for word in words:
        assert word in error, error


@pytest.mark.parametrize("path", ["/no/such/config.json", "", "."])
def test_file_that_cannot_be_read_is_named(path, tmp_path, capsys):
    assert f'--config_json "{path}" cannot be read' in refused(
        tmp_path, capsys, f"--config_json={path}"
    )


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="there is no endless file")
def test_endless_file_is_not_read_to_its_end(tmp_path, capsys):
    assert "more than 1,048,576 bytes" in refused(tmp_path, capsys, "--config_json=/dev/zero")


@pytest.mark.parametrize(
    "other", [[f"--config={CONFIG}"], ["--config", CONFIG], [f"-config={CONFIG}"]]
)
def test_two_configurations_are_refused(other, write, tmp_path, capsys):
    for words in ([f"--config_json={write({})}", *other], [*other, f"--config_json={write({})}"]):
        assert "--config and --config_json are both given" in refused(tmp_path, capsys, *words)


def test_flag_without_a_file(tmp_path, capsys):
    assert "config_json" in refused(tmp_path, capsys, "--config_json")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (
            "--config.optimizer.learning_rat=1",
            "unknown config key optimizer.learning_rat; did you mean optimizer.learning_rate?",
        ),
        ("--config.num_steps=many", "num_steps"),
        ("--config.num_steps=0", "it must be at least 1"),
    ],
)
def test_wrong_overrides_are_refused_as_over_a_file(flag, words, write, tmp_path, capsys):
    assert words in refused(tmp_path, capsys, f"--config_json={write({})}", flag)


def test_a_value_that_is_replaced_is_checked_all_the_same(write, tmp_path, capsys):
    assert 'seed is "x"' in refused(
        tmp_path, capsys, f"--config_json={write({'seed': 'x'})}", "--config.seed=3"
    )


def test_nothing_in_the_file_is_executed(write, tmp_path, capsys):
    trace = tmp_path / "trace"
    code = f"__import__('os').mkdir({str(trace)!r})"
    write({"data": {"path": code}, "sample": {"labels": code}, "model": {"size": code}})
    refused(tmp_path, capsys, f"--config_json={tmp_path / 'some config.json'}")
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    assert "not JSON" in refused(tmp_path, capsys, f"--config_json={tmp_path / 'evil.py'}")
    assert not trace.exists()
    cli.main(["djepa_jax", f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'evil.py'}"])
    assert trace.exists(), "as --config the same file is a program"


# the commands around it


def test_help_names_the_flag_and_reads_no_file(capsys):
    assert cli.main(["djepa_jax", "--help", "--config_json=/no/such.json"]) == 0
    output = capsys.readouterr().out
    assert "--config_json" in output and "trust" in output


def test_suggested_commands_keep_the_flag(write, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["main.py", f"--config_json={write({'seed': 5})}", "--workdir=runs/x"]
    )
    words = cli.command_line("--mode=sample", "--config.sample.count=4")
    assert "'--config_json=" in words and words.endswith(
        "--workdir=runs/x --mode=sample --config.sample.count=4"
    )


ONE_START = (
    "--distributed slurm",
    "--rendezvous-timeout=600",
    "--heartbeat_timeout 9",
    "--restore_from=a@1",
    "--process_id=3",
)


def test_suggested_commands_leave_out_what_belongs_to_one_start(monkeypatch):
    words = ["--config=c.py", *" ".join(ONE_START).split(), "--workdir=w", "--mode", "train"]
    monkeypatch.setattr(sys, "argv", ["main.py", *words])
    assert cli.command_line().endswith("-m djepa_jax.main --config=c.py --workdir=w --mode train")


def test_benchmark_takes_it_too(write, capsys):
    values = benchmark.parse(["benchmark", f"--config_json={write({'seed': 5})}", "--steps=1"])
    assert values.config.seed == 5 and values.steps == 1
    assert benchmark.main(["benchmark", f"--config_json={write({'sed': 5})}"]) == 2
    assert 'unknown config key "sed"; did you mean seed?' in capsys.readouterr().err


def test_find_is_none_without_the_flag():
    assert (
        json_config.find(["djepa_jax", "--config=x", "--workdir", "a", "--out=config_json"]) is None
    )
    with pytest.raises(ConfigError, match="both given"):
        json_config.find(["djepa_jax", "--config=x", "--config_json=y"])
