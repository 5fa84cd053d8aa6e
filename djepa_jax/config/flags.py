"""The command line: flags of each mode, and the configuration with what the command line changes.

A configuration is a Python file (`--config`) or data (`--config_json`: a JSON object of keys that
differ from `configs/default.py`, or the `config.json` of a workdir or an export). A workdir that
has one needs neither.
"""

import dataclasses
import difflib
import inspect
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence

from absl import flags
from ml_collections import ConfigDict

from djepa_jax.config import files
from djepa_jax.config.convert import (
    ConfigError,
    check_options,
    closest,
    convert_group,
    flatten,
    from_word,
    keys_of,
    unknown_key,
)
from djepa_jax.config.experiment import SHARED_LOSS_FIELDS, Experiment
from djepa_jax.config.presets import preset_values
from djepa_jax.config.stored import FILE_NAME, models_near, upgrade
from djepa_jax.core.losses import TOKEN_LOSSES
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.storage import as_path

MAX_BYTES = 2**20  # of a JSON file
RENAMED = {  # keys of earlier versions
    "microbatches": "grad_accumulation_steps",
    "sample.clip_x0": "loss.options.clip_x0",
    "sample.time_shift": "loss.options.time_shift",
}
# Flags that name files and folders.
PATHS = ("config", "config_json", "workdir", "out", "source", "restore_from", "init_from")
PATHS += ("compare",)
# Flags that belong to one start and not to the run.
OF_ONE_START = ("distributed", "coordinator", "num_processes", "process_id", "restore_from")
OF_ONE_START += ("rendezvous_timeout", "heartbeat_timeout", "init_from", "wandb")


DASHES = re.compile(r"[-\u2013\u2014\u2212]+(?=[A-Za-z])")  # of a flag, also those of web pages
PRINTED_QUOTES = ("\u201c", "\u201d", "\u201e", "\u2018", "\u2019")
ALSO_CALLED = {  # flags
    "workdir": "output_dir log_dir logdir run_dir save_dir",
    "source": "checkpoint ckpt weights",
    "restore_from": "resume resume_from",
}


class UsageError(UserError, ValueError):
    """A command line that cannot be understood."""


class HelpRequest(Exception):
    """Somebody asked for help; the message is it."""


def parse(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    usage: Callable[[], str],
    required: Callable[[flags.FlagValues], Sequence[str]],
) -> tuple[flags.FlagValues, Experiment | None]:
    """Read the command line; no global state is touched.

    Args:
        argv: the words, the program's name first.
        define: defines the flags beside those of the configuration.
        usage: gives the text of the help.
        required: which flags must be given, from the values.

    Returns:
        the flags' values, and the configuration; None without one.

    Raises:
        UsageError, ConfigError: an unknown flag or key, a missing file, a value that cannot work.
        HelpRequest: help was asked for.
    """
    argv = [argv[0], *_joined(_plain(word) for word in argv[1:])]
    _answer_help(argv, usage)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    define(values)
    flags.DEFINE_string("config", None, "NAME[:VARIANT] or FILE.py", flag_values=values)
    flags.DEFINE_string("config_json", None, "JSON over the defaults", flag_values=values)
    overrides = [word for word in argv if word.startswith("--config.")]
    _read_flags(values, argv)
    _expand_paths(values)
    needed = [*required(values), *(["config"] if overrides else [])]
    if "config" in needed and not (values.config or values.config_json):
        stored = as_path(values.workdir) / FILE_NAME
        values.config_json = str(stored) if values.workdir and stored.exists() else None
    for name in needed:
        if not values[name].value and not (name == "config" and values.config_json):
            more = ", or a --workdir with the config.json of a run" if name == "config" else ""
            if more and values.workdir:
                path = as_path(values.workdir)
                found = "has none" if path.exists() else "does not exist"
                more += f' ("{values.workdir}" {found}{models_near(path)})'
            needed_by = f"--mode={values.mode} needs it{more}"
            raise UsageError(f"--{name} is missing: {needed_by}; djepa --help has an example.")
    return values, read_config(values.config, values.config_json, overrides)


def _answer_help(argv: Sequence[str], usage: Callable[[], str]) -> None:
    """Raise HelpRequest, or UsageError for a word that there is no help on, if help is asked."""
    for index, word in enumerate(argv):
        if re.match("--(help|h$)", word) or (index, word) == (1, "help"):
            rest = [word.partition("=")[2], *argv[index + 1 : index + 2]]
            topic = next((word for word in rest if word and not word.startswith("-")), "")
            if topic == "keys":
                raise HelpRequest((files.FOLDER / "default.py").read_text("utf-8"))
            if topic:
                raise UsageError(
                    f'there is no help on "{topic}"; djepa --help is on modes and flags, djepa '
                    "--help=keys on the keys of a configuration."
                )
            raise HelpRequest(usage())


def _plain(word: str) -> str:
    """A word with the dashes and underscores of our flags: -measure-scale is --measure_scale."""
    name, equals, value = word.partition("=")
    if DASHES.match(name):
        name = "--" + DASHES.sub("", name, count=1).replace("-", "_")
    if (value if equals else name).startswith(PRINTED_QUOTES):
        raise UsageError(f"{word} has printed quotes, which a shell does not know: type \" or '.")
    return f"{name}{equals}{value}"


def _joined(words: Iterable[str]) -> list[str]:
    """The words, where --config.KEY VALUE is one: --config.KEY=VALUE."""
    joined = []
    for word in words:
        before = joined[-1] if joined else ""
        if before.startswith("--config.") and "=" not in before and word[:1] not in ("-", "="):
            joined[-1] = f"{before}={word}"
        else:
            joined.append(word)
    return joined


def _read_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Let flags take their values from the command line; UsageError if they cannot."""
    try:
        rest = values([word for word in argv if not word.startswith("--config.")])[1:]
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, values) from error
    except flags.Error as error:
        text = " ".join(str(error).split())
        if choice := re.search("=(.*): value should be one of <(.*)>", text):
            likely = difflib.get_close_matches(choice[1], choice[2].split("|"), n=1)
            text += f"; did you mean {likely[0]}?" if likely else ""
        raise UsageError(text) from error
    swallowed = [name for name in values if str(values[name].value).startswith("--")]
    if swallowed:
        raise UsageError(f"--{swallowed[0]} needs a value: --{swallowed[0]}=VALUE.")
    if rest:
        remedy = "write --flag=VALUE, without spaces around the ="
        modes = values["mode"].parser.enum_values
        before = argv[argv.index(rest[0]) - 1]
        if re.match("--[^=]+=.", before):
            remedy = f'if it is of the value before, write both in quotes: "{before} {rest[0]}"'
        if "=" in rest[0][1:]:
            remedy = f"write --{rest[0]}"
        for flag, known in (("mode", modes), ("config", files.builtin_names())):
            if likely := difflib.get_close_matches(rest[0], known, n=1, cutoff=0.8):
                remedy = f"write --{flag}={likely[0]}"
        raise UsageError(f'"{rest[0]}" is not a flag; {remedy}.')


def _unknown_flag(flag: str, values: flags.FlagValues) -> UsageError:
    """The error for a flag that there is not: perhaps it is a key, or misspelt."""
    key = closest(flag, keys_of(Experiment))
    if key and key.rpartition(".")[2] == flag:
        return UsageError(f"--{flag} is a key of the configuration: write --config.{key}=VALUE.")
    likely = [name for name, words in ALSO_CALLED.items() if flag in words.split()]
    likely = likely or difflib.get_close_matches(flag, list(values), n=1)
    likely = [f"--{name}" for name in likely] + ([f"--config.{key}"] if key else [])
    remedy = f"did you mean {' or '.join(likely)}?" if likely else "djepa --help lists the flags."
    return UsageError(f"there is no flag --{flag}; {remedy}")


def _expand_paths(values: flags.FlagValues) -> None:
    """Let `~` be the home folder, which no shell does after "="; UsageError for bytes."""
    for name in PATHS:
        path = os.path.expanduser(values[name].value or "")
        if any("\ud800" <= character <= "\udfff" for character in path):
            raise UsageError(
                f"--{name}={path!a} is not UTF-8, which some files cannot store; rename it."
            )
        values[name].value = path


def command_line(*extra: str) -> str:
    """The command that is running, with `extra` flags, ready to be pasted where it was started."""
    kept, words = [], iter(sys.argv[1:])
    for word in words:
        name, equals, _ = word.partition("=")
        if name.lstrip("-").replace("-", "_") not in OF_ONE_START:
            kept.append(word)
        elif not equals:
            next(words, None)  # its value
    return shlex.join([*program(), *kept, *extra])


def program() -> list[str]:
    """The words that start this program: `djepa`, if a shell finds the one of this Python."""
    python, found = pathlib.Path(sys.executable), shutil.which("djepa")
    if found and pathlib.Path(found).parent == python.parent:
        return ["djepa"]
    if python.is_relative_to(pathlib.Path.cwd()):
        python = python.relative_to(pathlib.Path.cwd())
    return [str(python), "-m", "djepa_jax"]


def read_config(
    spec: str | None, json_path: str | None, overrides: Sequence[str]
) -> Experiment | None:
    """The configuration of a file or of JSON, with --config.KEY=VALUE words on top.

    Raises:
        ConfigError: it cannot be read, a key is unknown, or a value cannot work.
    """
    if spec and json_path:
        raise ConfigError("--config and --config_json are both given; leave out one of them.")
    if not spec and not json_path:
        if overrides:
            raise ConfigError(f"{overrides[0]} needs a --config to change.")
        return None
    config = files.load(spec) if spec else ConfigDict(_read_json(json_path))
    values = _overridden(config, overrides).to_dict()
    try:
        return Experiment.from_dict(values)
    except ConfigError as error:
        name = values["evaluation"]["preset"]
        if not any(f"config.{key} is" in str(error) for key in preset_values(name, "")):
            raise
        said = f"{error} evaluation.preset {name} sets it, unless the command line does."
        raise ConfigError(said) from error


def _overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A configuration with the values of some --config.KEY=VALUE words."""
    pairs = [word.removeprefix("--config.").partition("=") for word in overrides]
    changes = {key: word if equals else None for key, equals, word in pairs}
    convert_group(config.to_dict(), Experiment)  # a file's own faults come first
    with config.unlocked():
        if changes.get("data.source", config.data.source) != config.data.source:
            config.data.source_options = ConfigDict()  # which are another source's
        named = changes.get("data.modality", config.data.modality)
        if named != config.data.modality and named in MODALITIES:
            fields = inspect.signature(MODALITIES[named]).parameters
            options = config.data.options.items()
            config.data.options = ConfigDict({k: v for k, v in options if k in fields})
        _complete_options(config, changes.get("loss.name", config.loss.name))
    known = keys_of(Experiment)
    for group, options in flatten(config.to_dict()).items():
        if isinstance(options, dict):
            options = flatten(options, f"{group}.")  # those of the parts of a pair, too
            known |= {name: type(value) for name, value in options.items()}
    for key, word in changes.items():
        if key in RENAMED:
            raise ConfigError(f"config.{key} is called config.{RENAMED[key]} now.")
        if key.startswith("loss.options."):
            name = key.split(".", 2)[2]
            check_options("loss.options", {name: None}, set(config.loss.options), "this loss")
        if key not in known:
            raise unknown_key(key, known)
        if word is None and known[key] is not bool:
            raise ConfigError(f"config.{key} has no value: write --config.{key}=VALUE.")
        changes[key] = word is None or from_word(word, known[key], key)
    size = changes.get("model.size", config.model.size)
    changes = preset_values(changes.get("evaluation.preset", "none"), size) | changes
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


def _complete_options(config: ConfigDict, name: str) -> None:
    """Let all options of the loss be set; those of another loss than the file's are left out."""
    kind = TOKEN_LOSSES.get(name)
    if kind is None:
        return  # which is said later
    own = {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if field.name not in SHARED_LOSS_FIELDS and field.default is not dataclasses.MISSING
    }
    given = config.loss.options.to_dict() if name == config.loss.name else {}
    config.loss.options = ConfigDict(own | given)


def _read_json(path: str) -> dict:
    """All keys of a configuration: those in a JSON file, the others as in `configs/default.py`."""
    try:
        with as_path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        given = json.loads(data, parse_constant=_refuse_constant)
        given = given["config"] if isinstance(given, dict) and "kind" in given else given
        if not isinstance(given, dict):
            raise ValueError('it must hold an object such as {"seed": 1}')
        values = files.builtin("default").get_config().to_dict()
        if "format" in given or "jepa_weight above 0" in given.get("loss", {}):
            given = upgrade(given)
        for name, value in _with_dotted_names(given):
            *groups, key = name.split(".", 1)
            place = values.get(groups[0], {}) if groups else values
            if key not in place:
                raise unknown_key(name, keys_of(Experiment))
            place[key] = value
        return convert_group(values, Experiment)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f'--config_json "{path}" cannot be read: {reason}.') from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'--config_json "{path}": {error}') from error


def _with_dotted_names(given: dict) -> list[tuple[str, object]]:
    """Names and values; groups of keys are taken apart."""
    pairs = []
    for name, value in given.items():
        nested = isinstance(value, dict) and "." not in name
        pairs += [(f"{name}.{k}", v) for k, v in value.items()] if nested else [(name, value)]
    return pairs


def _refuse_constant(word: str):
    raise ValueError(f"{word} is not a number in JSON")
