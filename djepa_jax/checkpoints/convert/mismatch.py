"""Tensors that do not fit a model: a table of what differs, and config keys that would fit."""

import re
from collections.abc import Mapping

from djepa_jax.core.models.djepa import SIZES, ModelConfig
from djepa_jax.runtime.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
LAYER = re.compile(r"(?<=blocks\.)\d+(?=\.)")  # the number of a layer, in the authors' names


class MismatchError(UserError, ValueError):
    """Tensors that do not fit the model; the message is the table."""


def check_shapes(
    found: Shapes, expected: Shapes, where: str, model: ModelConfig | None = None
) -> None:
    """Raise MismatchError unless a file, which `where` names, has the shapes that a model needs.

    With `model`, the message also says which config keys a file with the authors' names asks for.
    """
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if not names:
        return
    rows: dict[tuple[str, ...], list[int]] = {}  # layers whose rows differ by their number alone
    for name in names:
        problem = "missing" if name not in found else "shape" if name in expected else "surplus"
        row = (LAYER.sub("{}", name), problem, found.get(name, "-"), expected.get(name, "-"))
        rows.setdefault(tuple(map(str, row)), []).extend(map(int, LAYER.findall(name)[:1]))
    lines = [("tensor", "problem", "in the file", "expected")]
    for (name, *rest), layers in sorted(rows.items()):
        name = name.encode("unicode_escape").decode()  # a terminal would obey control characters
        lines.append((name.replace("{}", _numbers(layers)) if layers else name, *rest))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    hints = suggestions(found, model) if model else []
    advice = f"\nThe file is of a model with {' '.join(hints)}" if hints else ""
    raise MismatchError(
        "\n  ".join([f"{where} does not fit the config; nothing was written.{advice}", *table])
    )


def _numbers(layers: list[int]) -> str:
    """Layer numbers as 3, {0..11} or {1,3}."""
    if len(layers) == 1:
        return str(layers[0])
    listed = sorted(layers)
    if listed[-1] - listed[0] == len(listed) - 1:
        return f"{{{listed[0]}..{listed[-1]}}}"
    return f"{{{','.join(map(str, listed))}}}"


def suggestions(found: Shapes, model: ModelConfig) -> list[str]:
    """Flags that make a config describe the model in the file, as far as its tensors tell."""
    try:
        theirs = _config_of(found)
    except (LookupError, TypeError, ValueError, ArithmeticError):  # another kind of file
        return []
    ours = {
        "loss.name": "diffusion" if model.denoiser_out == 2 * model.token_dim else "flow_matching",
        "loss.jepa_weight": float(model.jepa_head),
        "data.num_classes": getattr(model.conditioner, "num_classes", 0),
    }
    ours |= {key: getattr(model, key.removeprefix("model.")) for key in theirs.keys() - ours.keys()}
    changed = {key: value for key, value in theirs.items() if ours[key] != value}
    for name, sizes in SIZES.items():
        size = {f"model.{key}": value for key, value in sizes.items() if f"model.{key}" in theirs}
        if size.items() <= theirs.items() and size.keys() & changed.keys():
            changed = {"model.size": name} | {k: v for k, v in changed.items() if k not in size}
    return [f"--config.{key}={value}" for key, value in changed.items()]


def _config_of(found: Shapes) -> dict[str, int | float | str | bool]:
    """What the shapes of the authors' tensors say about their model, by config key."""

    def depth(prefix: str) -> int:
        return len({LAYER.search(name)[0] for name in found if name.startswith(prefix)})

    width, channels = found["z_proj.weight"]
    head = found.get("encoder_blocks.0.attn.q_norm.weight")  # without it, nothing tells the heads
    two_outputs = found["diffloss.net.final_layer.linear.weight"][0] == 2 * channels
    return {
        "model.width": width,
        "model.encoder_depth": depth("encoder_blocks."),
        "model.predictor_depth": depth("decoder_blocks."),
        **({"model.num_heads": width // head[0]} if head else {}),
        "model.mlp_ratio": found["encoder_blocks.0.mlp.fc1.weight"][0] / width,
        "model.denoiser_depth": depth("diffloss.net.res_blocks."),
        "model.denoiser_width": found["diffloss.net.input_proj.weight"][0],
        "loss.name": "diffusion" if two_outputs else "flow_matching",
        "loss.jepa_weight": float(any(name.startswith("jepaloss.") for name in found)),
        "model.qk_norm": head is not None,
        "model.num_prefix_tokens": found["buffer"][1],
        "data.num_classes": found["class_emb.weight"][0],
    }
