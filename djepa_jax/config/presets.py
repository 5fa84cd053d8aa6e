"""Named settings of evaluations whose figures others have published, and of a quick look."""

from collections.abc import Mapping

PUBLISHED_SHAPE = (256, 256, 3)
_FULL = {"evaluation.kind": "inception", "evaluation.count": 50_000}
_PAPER = {"sample.order": "random", "sample.num_ar_steps": 64, "sample.num_denoise_steps": 100}
PRESETS: dict[str, Mapping] = {
    "paper_no_cfg": _FULL | _PAPER | {"sample.cfg_scale": 1.0, "sample.temperature": 0.94},
    "paper_cfg": _FULL | _PAPER | {"sample.cfg_schedule": "linear", "sample.temperature": 0.98},
    "adm": _FULL,  # samples drawn as the configuration has it
    "trend": {"evaluation.count": 1000},
}
CFG_SCALES = {"L": 3.0, "H": 3.9}  # of "paper_cfg"; for other sizes the paper has none


def preset_values(name: str, size: str) -> dict:
    """Keys by dotted name and their values for a `model.size`; empty where there is no preset."""
    values = dict(PRESETS.get(name, {}))
    if name == "paper_cfg" and size in CFG_SCALES:
        values["sample.cfg_scale"] = CFG_SCALES[size]
    return values
