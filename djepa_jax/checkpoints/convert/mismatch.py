"""What to say when tensors do not fit a model: every mismatch in one table, and the config keys
that would fit.
"""

import re
from collections.abc import Iterable, Mapping

from djepa_jax.core.models.djepa import SIZES, ModelConfig
from djepa_jax.runtime.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
NUMBER = re.compile(r"(?<=blocks\.)(\d+)(?=\.)")  # of a layer, in the authors' names
SIZE_KEYS = ("width", "encoder_depth", "predictor_depth", "denoiser_depth", "denoiser_width")


class MismatchError(UserError, ValueError):
    """Tensors that do not fit the model; the message is the table."""


def check_shapes(
    found: Shapes, expected: Shapes, where: str, model: ModelConfig | None = None
) -> None:
    """Compare what a file holds with what a model needs.

    Args:
        found: shapes in the file.
        expected: shapes that the model needs.
        where: names the file in the message.
        model: with it, the message says which config keys the file asks for (authors' names only).

    Raises:
        MismatchError: missing, surplus or misshapen tensors, all of them.
    """
    rows = [(name, "missing", "-", expected[name]) for name in expected if name not in found]
    rows += [(name, "surplus", found[name], "-") for name in found if name not in expected]
    rows += [
        (n, "shape", found[n], expected[n])
        for n in expected
        if n in found and tuple(found[n]) != tuple(expected[n])
    ]
    if rows:
        hints = suggestions(found, model) if model else []
        advice = f"\nThe file is of a model with {' '.join(hints)}" if hints else ""
        raise MismatchError(
            f"{where} does not fit the config; nothing was written.{advice}\n{_table(rows)}"
        )


def _table(rows: Iterable[tuple]) -> str:
    """Aligned columns; rows that differ only by the number of their layer share a line."""
    grouped: dict[tuple, list[int]] = {}
    for name, problem, found, expected in rows:
        numbers = grouped.setdefault(
            (NUMBER.sub("{}", name), problem, str(found), str(expected)), []
        )
        numbers += [int(number) for number in NUMBER.findall(name)[:1]]
    lines = [("tensor", "problem", "in the file", "expected")]
    lines += [
        (_printable(name).replace("{}", _ranges(numbers)), *rest)
        for (name, *rest), numbers in sorted(grouped.items())
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _printable(name: str) -> str:
    """A tensor's name without control characters, which a terminal would obey."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def _ranges(numbers: list[int]) -> str:
    """Layer numbers as {0..11}, or 3 when it is one."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
    return text if text.isdecimal() else f"{{{text}}}"


def suggestions(found: Shapes, model: ModelConfig) -> list[str]:
    """Flags that would make a config describe the model in the file, as far as its tensors tell;
    none for other files.
    """
    flags, size = [], _size_of(found)
    if not size:
        return []
    other = {key: value for key, value in size.items() if getattr(model, key) != value}
    if other:
        name = next((name for name, sizes in SIZES.items() if size.items() <= sizes.items()), None)
        flags += (
            [f"--config.model.size={name}"]
            if name
            else [f"--config.model.{key}={value}" for key, value in other.items()]
        )
    for flag, value, present in _other_keys(found):
        if value is not None and value != present(model):
            flags.append(f"--config.{flag}={value}")
    return flags


def _dimension(found: Shapes, name: str, axis: int) -> int | None:
    shape = found.get(name, ())
    return shape[axis] if len(shape) > axis else None


def _depth(found: Shapes, prefix: str) -> int:
    return len(
        {match[1] for name in found if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
    )


def _size_of(found: Shapes) -> dict[str, int]:
    """Widths and depths that a file's tensors have; empty where they cannot be told."""
    values = (
        _dimension(found, "z_proj.weight", 0),
        _depth(found, "encoder_blocks"),
        _depth(found, "decoder_blocks"),
        _depth(found, "diffloss.net.res_blocks"),
        _dimension(found, "diffloss.net.input_proj.weight", 0),
    )
    if not all(values):
        return {}
    head = _dimension(
        found, "encoder_blocks.0.attn.q_norm.weight", 0
    )  # without QK norm nothing tells the heads
    return dict(zip(SIZE_KEYS, values, strict=True)) | (
        {"num_heads": values[0] // head} if head else {}
    )


def _other_keys(found: Shapes):
    """(key, value in the file or None, how to read it from a model) of everything that is not a
    size.
    """
    outputs = _dimension(found, "diffloss.net.final_layer.linear.weight", 0)
    channels = _dimension(found, "z_proj.weight", 1)
    loss = {1: "flow_matching", 2: "diffusion"}.get(
        outputs // channels if outputs and channels else 0
    )
    has_head = any(name.startswith("jepaloss.") for name in found)
    return (
        (
            "loss.name",
            loss,
            lambda m: "diffusion" if m.denoiser_out == 2 * m.token_dim else "flow_matching",
        ),
        ("loss.jepa_weight", 1.0 if has_head else 0.0, lambda m: 1.0 if m.jepa_head else 0.0),
        ("model.qk_norm", any(".attn.q_norm." in name for name in found), lambda m: m.qk_norm),
        ("model.num_prefix_tokens", _dimension(found, "buffer", 1), lambda m: m.num_prefix_tokens),
        ("data.num_classes", _dimension(found, "class_emb.weight", 0), lambda m: m.num_classes),
    )
