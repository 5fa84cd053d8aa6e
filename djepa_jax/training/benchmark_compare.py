"""Results of another commit or program beside ours (`--mode=benchmark --compare=FILE`)."""

import json
from collections.abc import Collection

from djepa_jax.config.convert import ConfigError, flatten
from djepa_jax.runtime.storage import as_path

FORM = '{"train": {"batch_size": 256, "milliseconds": {"median": 816.0}}}'
# What figures depend on besides, by their names in results.
ENVIRONMENT = ("XLA_FLAGS", "GLIBC_TUNABLES")  # variables
FACTS = ("device", "devices", "batch_size", *ENVIRONMENT, "timing", "versions", "config")


def read_other(file: str, names: Collection[str]) -> dict:
    """Results in a file, which has at least one of the parts `names`.

    Raises:
        ConfigError: it cannot be read, has another form, or shares no part.
    """
    try:
        other = json.loads(as_path(file).read_text("utf-8"))
        comparison(other, other, file)  # which meets whatever is not of the form
    except OSError as error:
        raise ConfigError(f'--compare "{file}" cannot be read: {error.strerror}.') from error
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f'--compare "{file}" must be of the form {FORM} ({reason}).') from error
    parts = timed(other)
    if not parts.keys() & set(names):
        raise ConfigError(
            f'--compare "{file}" times {", ".join(parts) or "nothing"}, this run '
            f"{', '.join(names)}; measure a part that both have."
        )
    return other


def timed(results: dict) -> dict[str, dict]:
    """The parts of some results that were timed."""
    return {k: v for k, v in results.items() if isinstance(v, dict) and "milliseconds" in v}


def cost(part: dict) -> float:
    """Milliseconds an image."""
    return part["milliseconds"]["median"] / part["batch_size"]


def comparison(ours: dict, other: dict, file: str) -> str:
    """A table of the parts that both have, and below it what else differs."""
    ours = json.loads(json.dumps(ours))  # as the other was read: tuples are lists
    lines, told = ["", f"{'':<20}{'here':<32}{file:<32}an image: theirs / ours"], {}
    theirs = timed(other)
    for name, part in timed(ours).items():
        if name in theirs:
            pair, ratio = (part, theirs[name]), cost(theirs[name]) / cost(part)
            lines.append(f"{name:<20}{spread(pair[0]):<32}{spread(pair[1]):<32}{ratio:.3f}")
            for difference in differences(ours | pair[0], other | pair[1]):
                told.setdefault(difference, []).append(name)
    lines += [f"differs: {difference} ({', '.join(names)})" for difference, names in told.items()]
    return "\n".join(lines)


def spread(part: dict) -> str:
    """Median and 10th to 90th percentile, where these are known."""
    ms = part["milliseconds"]
    known = f" ({ms['p10']:.4g} to {ms['p90']:.4g})" if {"p10", "p90"} <= ms.keys() else ""
    return f"{ms['median']:.4g} ms{known}"


def differences(ours: dict, theirs: dict) -> list[str]:
    """In which facts two parts differ; those that one of them does not tell are named alone."""
    here, there = ({fact: side[fact] for fact in FACTS if fact in side} for side in (ours, theirs))
    told = [f"{fact} is told here alone" for fact in here if fact not in there]
    flat, other = (
        flatten({fact: side[fact] for fact in here if fact in there}) for side in (here, there)
    )
    pairs = {name: (flat.get(name), other.get(name)) for name in flat | other}
    return told + [f"{name} {a} here, {b} there" for name, (a, b) in pairs.items() if a != b]
