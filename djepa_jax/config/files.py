"""Configuration files: the built-in ones by name, others by path, all of them Python programs."""

import difflib
import importlib.util
import pathlib
import types

from ml_collections import ConfigDict

from djepa_jax.config.convert import ConfigError

_HERE = pathlib.Path(__file__).parent
_CHECKOUT = _HERE.parents[1] / "configs"
# Beside the package in a checkout, inside of it where it was installed from a wheel.
FOLDER = _CHECKOUT if (_CHECKOUT / "default.py").is_file() else _HERE / "builtin"


def builtin_names() -> list[str]:
    """The configurations that can be named without a path."""
    files = (path for path in FOLDER.glob("*.py") if "def get_config" in path.read_text("utf-8"))
    return sorted(path.stem for path in files)


def builtin(name: str) -> types.ModuleType:
    """A built-in configuration file, such as "default", as a module."""
    return _run(FOLDER / f"{name}.py")


def load(spec: str) -> ConfigDict:
    """The configuration that NAME, NAME:VARIANT or PATH.py[:VARIANT] stands for.

    Raises:
        ConfigError: there is none, or it failed.
    """
    name, _, variant = spec.partition(".py:") if ".py:" in spec else _split(spec)
    path = _find(name.removesuffix(".py"), spec)
    try:
        get_config = _run(path).get_config
        return get_config(variant) if variant else get_config()
    except Exception as error:  # a config file is a program: anything can happen in it
        while error.__context__ is not None:  # the innermost one is the file's own
            error = error.__context__
        raise ConfigError(f'--config "{spec}" failed: {type(error).__name__}: {error}') from error


def _split(spec: str) -> tuple[str, str, str]:
    """A name and a variant; a path that ends in .py has no variant here."""
    return (spec, "", "") if spec.endswith(".py") else spec.partition(":")


def _find(name: str, spec: str) -> pathlib.Path:
    path = pathlib.Path(f"{name}.py")
    if path.is_file():
        return path
    inside = FOLDER / path.name
    if path.parent.as_posix() in (".", "configs") and inside.is_file():
        return inside
    if spec.endswith(".json"):
        raise ConfigError(f'--config "{spec}" is to be a Python file; write --config_json={spec}.')
    names = builtin_names()
    likely = difflib.get_close_matches(path.stem.lower().replace("-", "_"), names, n=1)
    raise ConfigError(
        f'--config "{spec}" is neither a Python file nor one of {", ".join(names)} '
        f"(perhaps with :variant){f'; did you mean {likely[0]}?' if likely else '.'}"
    )


def _run(path: pathlib.Path) -> types.ModuleType:
    found = importlib.util.spec_from_file_location(f"djepa_config_{path.stem}", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
