"""What the page asks for, checked as a configuration is, and what it is told while samples grow.

A request is settings of sampling (keys of `config.sample`), and perhaps a picture with a mask.
Those that decide on the program have few values, so that programs are found again.
"""

import base64
import dataclasses
import io
import os
import pathlib
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from djepa_jax.checkpoints.restore import check_same_model, find_model, guide_params, is_export
from djepa_jax.config.convert import flatten
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.flags import program
from djepa_jax.config.places import places_shape
from djepa_jax.core import sharding
from djepa_jax.core.models.conditioning import Classes, Sum
from djepa_jax.core.models.text import Text
from djepa_jax.core.sampler import SampleInputs, SamplerConfig
from djepa_jax.core.schedules import orders_for
from djepa_jax.data.images import BrokenImage
from djepa_jax.data.records import cut_file
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.storage import as_path
from djepa_jax.sampling.model import OF_A_CALL, Model, load

COUNTS = (1, 4, 9, 16)
GUIDANCE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
TEMPERATURES = (0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1)
AR_STEPS = (1, 2, 4, 8, 16, 24, 32, 64, 128, 256)
DENOISE_STEPS = (5, 10, 25, 50, 100)
LIMITED = ("count", "order", "num_ar_steps", "num_denoise_steps")  # that decide on the program
MAX_LENGTH = 300  # characters of a setting
SHOWN = 16  # pictures of a sample that grows
TYPES = {"png": "image/png", "gif": "image/gif", "webp": "image/webp", "wav": "audio/wav"}
TYPES |= {"mp4": "video/mp4"}


class RequestError(UserError, ValueError):
    """A request that gets no answer but a line and a status of HTTP."""

    def __init__(self, text: str, status: int = 400):
        super().__init__(text)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that was checked. `mask` is bool `[H, W]`, True where `picture` is made anew."""

    settings: dict[str, Any]
    experiment: Experiment  # with these
    picture: np.ndarray | None = None
    mask: np.ndarray | None = None


def load_model(experiment: Experiment, workdir: str) -> tuple[Model, Experiment]:
    """A model that samples as a configuration says, and the configuration stored with it."""
    check_same_model(find_model(workdir).config, experiment)
    model = load(workdir, experiment.mesh, experiment.autoencoder.path or None)
    stored, model.config = model.config, experiment.completed_by(model.config)
    if model.config.sampler.autoguided:
        guide_params(model.config, sharding.make_mesh(experiment.mesh))  # refused now, kept
    return model, stored


class Studio:
    """Makes what is asked for; one job at a time.

    Args:
        model: of which samples are made.
        stored: the configuration that `load` finds, which commands need not repeat.
        workdir: as it was named.
    """

    def __init__(self, model: Model, stored: Experiment, workdir: str):
        self.config, self.stored, self.workdir = model.config, stored, workdir
        self._model, self._step = model.watched(self._watch), model.step
        self._send: Callable[[dict], None] = lambda event: None
        self._compiled, self._seconds = set(), 0.0  # programs; the last one's first use
        sample, conditioner = self.config.sample, self.config.network.conditioner
        # The key that says what is drawn; empty where nothing can be said
        self.asks_for = "labels" if isinstance(conditioner, Classes | Sum) else ""
        if isinstance(conditioner, Text) and hasattr(sample, "prompt"):
            self.asks_for = "prompt"
        if sample.mix:  # which says it already
            self.asks_for = ""
        modality = self.config.modality
        # Whether examples are pictures or clips, of which places can be made anew
        editable = hasattr(modality, "tokens_at") and hasattr(modality, "put_back")
        self.paints = editable and len(places_shape(self.config)) > 1
        values = {"cfg_scale": GUIDANCE, "num_denoise_steps": DENOISE_STEPS}
        values["num_ar_steps"] = [n for n in AR_STEPS if n <= self.config.network.num_tokens]
        if self.config.token_loss.noises_per_token > 1:
            values["temperature"] = TEMPERATURES
        self.choices = {"count": COUNTS}
        self.choices |= {key: sorted({getattr(sample, key), *of}) for key, of in values.items()}
        self.choices["order"] = [*dict.fromkeys([sample.order, *orders_for(modality.grid)])]
        self.defaults = {key: getattr(sample, key) for key in (*self.choices, "seed")}
        self.defaults["count"] = COUNTS[1]
        if self.asks_for:
            self.defaults[self.asks_for] = "all" if self.asks_for == "labels" else ""

    def describe(self) -> dict:
        """What the page has to know."""
        names = self.config.class_names if self.asks_for == "labels" else ()
        classes = [(n if names.count(n) == 1 else str(i), n) for i, n in enumerate(names)]
        return {
            "name": as_path(self.workdir).name,
            "step": self._step,
            "asks_for": self.asks_for,
            "classes": [("all", "each in turn"), *classes],
            "choices": self.choices,
            "defaults": self.defaults,
            "painted": self.config.picture_shape[-3:-1] if self.paints else None,
        }

    def check(self, request: Any) -> Job:
        """What a request asks for; UserError if it cannot be had."""
        settings = request.get("settings", {}) if isinstance(request, dict) else None
        if not isinstance(settings, dict):
            raise RequestError('a request has settings: {"settings": {"seed": 1}}.')
        for key, value in settings.items():
            if key not in self.defaults:
                few = ", ".join(self.defaults)
                raise RequestError(f'"{key:.40}" cannot be set on this page; choose of {few}.')
            if not isinstance(value, str | int | float) or len(str(value)) > MAX_LENGTH:
                raise RequestError(f"{key} is to be a number, or a text that is not long.")
            if key in LIMITED and value not in self.choices[key]:
                few = ", ".join(map(str, self.choices[key]))
                raise RequestError(f"{key} is {value!r}; on this page it is one of {few}.")
        settings = self.defaults | settings
        experiment = self.config.updated({f"sample.{k}": v for k, v in settings.items()})
        _ = experiment.sample_conditions  # which checks what is drawn
        if "picture" not in request:
            return Job(settings, experiment)
        if not self.paints:
            raise RequestError("this model makes no pictures that can be painted on.")
        picture = self.read_picture(decoded(request["picture"]))
        mask = read_mask(request.get("mask"), picture.shape[-3:-1])
        return Job(settings, experiment, picture, mask)

    def read_picture(self, data: bytes) -> np.ndarray:
        """A file as an example, uint8 `[H, W, C]` or `[T, H, W, C]`, cut as training pictures are.

        Raises:
            RequestError: it is no picture, or has too few frames.
        """
        try:
            return cut_file(data, self.config.picture_shape)[0]
        except BrokenImage as error:
            raise RequestError(f"the picture cannot be read: {error}.") from error

    def address(self, picture: np.ndarray) -> str:
        """An example as an address that holds a file without loss."""
        files = files_of(self.config.modality, arrays_of(picture[None]), 0)
        return files.get("webp") or files["png"]

    def make(self, job: Job, send: Callable[[dict], None]) -> None:
        """Make samples, or places of a picture anew; an exception of `send` ends it."""
        sample, modality = job.experiment.sample, self.config.modality
        conditions, self._send, begun = job.experiment.sample_conditions, send, time.monotonic()
        how = {key: job.settings[key] for key in self.choices if key not in OF_A_CALL}
        how |= {"conditions": conditions, "seed": sample.seed}
        if job.picture is None:
            arrays = self._model.sample_arrays(**how)
        else:
            if not sample.final_denoise_steps:  # else segments change what is drawn
                how["num_segments"] = 1  # each number of hidden tokens compiles, so the sooner
            arrays = arrays_of(self._model.edit(job.picture, job.mask, **how))
        seconds, pictures = time.monotonic() - begun, modality.preview(arrays)
        samples = [
            {
                "title": title,
                "picture": "" if pictures is None else png_address(pictures[index]),
                "files": files_of(modality, arrays, index),
            }
            for index, title in enumerate(job.experiment.titles(conditions))
        ]
        told = {"command": self.command(job), "python": self.python(job)}
        send({"done": samples, "seconds": seconds} | told)

    def _watch(
        self, config: SamplerConfig, inputs: SampleInputs, steps: Iterator[np.ndarray]
    ) -> np.ndarray:
        """Tell of every step, with pictures of some; the tokens of the last."""
        total, first = config.num_ar_steps, int(inputs.sample_ids[0])
        program, begun = (config, len(inputs.sample_ids)), time.monotonic()
        if program not in self._compiled:
            self._send({"compiling": round(self._seconds)})
        for number, tokens in enumerate(steps, 1):
            event = {"step": number, "of": total}
            if is_shown(number, total):
                pictures = self._model.preview(tokens)
                addresses = [png_address(p) for p in ([] if pictures is None else pictures)]
                event |= {"first": first, "pictures": addresses}
            self._send(event)
        if program not in self._compiled:
            self._compiled.add(program)
            self._seconds = time.monotonic() - begun
        return tokens

    def command(self, job: Job) -> str:
        """What makes the same on the command line; empty for exports, which it does not sample."""
        if is_export(as_path(self.workdir)):
            return ""
        values, stored = flatten(job.experiment.to_dict()), flatten(self.stored.to_dict())
        told = {f"sample.{key}" for key in (self.asks_for, "count", "seed")}
        words = ["--mode=sample", "--out=samples.png"]
        if job.picture is not None:
            source = "picture.webp" if job.picture.ndim == 4 else "picture.png"  # as downloaded
            words = ["--mode=edit", f"--source={source}", "--mask=mask.png", "--out=edited.png"]
        for key, value in values.items():
            ours = key.startswith(("sample.", "autoencoder.")) and key != "sample.batch_size"
            if ours and (value != stored[key] or key in told):
                words.append(f"--config.{key}={value}")
        return shlex.join([*program(), f"--workdir={self.workdir}", *words])

    def python(self, job: Job) -> str:
        """What makes the same from Python."""
        sample, stored = job.experiment.sample, self.stored.sample
        if isinstance(self.config.network.conditioner, Classes) and not sample.mix:
            labels = job.experiment.sample_conditions.tolist()
            asked = f"[{labels[0]}] * {len(labels)}" if len({*labels}) == 1 else str(labels)
        else:
            keys = [key for key in (self.asks_for, "count") if key]
            changes = {f"sample.{key}": job.settings[key] for key in keys}
            asked = f"conditions=model.config.updated({changes}).sample_conditions"
        words = [asked, f"seed={sample.seed}"]
        for key, value in dataclasses.asdict(sample).items():
            if value != getattr(stored, key) and key not in (*OF_A_CALL, self.asks_for):
                words.append(f"{key}={value!r}")
        load = repr(self.workdir)
        if self.config.autoencoder.path != self.stored.autoencoder.path:
            load += f", autoencoder={self.config.autoencoder.path!r}"
        call = "sample(" if job.picture is None else "edit(picture, mask, "
        lines = ["import djepa_jax", f"model = djepa_jax.load({load})"]
        return "\n".join([*lines, f"pictures = model.{call}{', '.join(words)})"])


def is_shown(number: int, total: int) -> bool:
    """Whether a step, from 1, is among those that are seen; the last is seen when all is done."""
    return number < total and number * SHOWN // total > (number - 1) * SHOWN // total


def arrays_of(examples: np.ndarray) -> dict[str, np.ndarray]:
    """Pictures or clips as a modality exports them."""
    return {"clips" if examples.ndim == 5 else "images": examples}


def decoded(address: Any) -> bytes:
    """What a `data:` address holds."""
    try:
        return base64.b64decode(address.partition(";base64,")[2], validate=True)
    except (AttributeError, ValueError) as error:
        raise RequestError("the picture is to be a data: address.") from error


def read_mask(text: Any, shape: tuple[int, int]) -> np.ndarray:
    """Places `[H, W]` of a text of 0 and 1, row by row."""
    count = shape[0] * shape[1]
    if not isinstance(text, str) or len(text) != count or set(text) - {"0", "1"}:
        raise RequestError(f"the mask is to be a text of {count} characters 0 and 1.")
    if "1" not in text:
        raise RequestError("nothing is painted; paint over what is to be drawn anew.")
    return (np.frombuffer(text.encode(), np.uint8) == ord("1")).reshape(shape)


def png_address(picture: np.ndarray) -> str:
    """A picture `[H, W, 1 or 3]` as an address that holds it."""
    buffer = io.BytesIO()
    picture = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return data_address(buffer.getvalue(), "png")


def data_address(data: bytes, ending: str) -> str:
    """A file as an address that holds it."""
    kind = TYPES.get(ending, "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def files_of(modality, arrays: dict[str, np.ndarray], index: int) -> dict[str, str]:
    """The files in which a modality keeps an example, as addresses, by their endings."""
    with tempfile.TemporaryDirectory() as folder:
        modality.save(arrays, index, os.path.join(folder, "sample"))
        paths = sorted(pathlib.Path(folder).iterdir())
        return {p.suffix[1:]: data_address(p.read_bytes(), p.suffix[1:]) for p in paths}
