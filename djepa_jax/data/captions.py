"""Captions of examples: where a source has them, whether they can be read, which are held out."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from djepa_jax.config.experiment import Experiment
from djepa_jax.core.models.text import Reader, Text
from djepa_jax.data.images import BrokenImage
from djepa_jax.data.records import DataError, Source, checksum, digest_of

# Where they are without `data.captions`; outputs of a text encoder are in the array "embeddings".
CAPTIONS = {"npz": "captions", "folder": "captions.json", "tar": ".txt"}


class Captioned(Source):
    """Examples of a source whose conditions are `captions`, texts or outputs of a text encoder
    `[L, channels]`, as a `reader` takes them; a share of the captions is held out.
    """

    def __init__(self, source, captions: Sequence, reader: Reader, held_out: float, where: str):
        self.source, self.captions, self.reader = source, captions, reader
        hidden = np.array([_place(caption) < held_out for caption in captions])
        self.rows, self.held_out = np.flatnonzero(~hidden), np.flatnonzero(hidden)
        if not len(self.rows):
            raise DataError(
                f"data.held_out is {held_out}, which leaves none of the {len(captions)} captions; "
                "make it smaller."
            )
        self._share = held_out
        cut = sum(reader.size(caption) > reader.length for caption in captions)
        cuts = f"; {cut:,} are cut at {reader.length} places" if cut else ""
        kept = f" and {len(self.held_out):,} held out" if len(self.held_out) else ""
        self.note = f"{where}: {len(self.rows):,} captions to learn{kept}{cuts}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = int(self.rows[index])
        return self.source[row] | {"condition": self.reader.encode(self.captions[row])}

    def key(self, index: int) -> str:
        """What the source calls an example."""
        return self.source.key(int(self.rows[index]))

    def digest(self) -> str:
        """A checksum of the source, the captions, and the share that is held out."""
        return checksum(digest_of(self.source), *self.captions, str(self._share))

    def in_turn(self, count: int) -> np.ndarray:
        """Conditions `[count, ...]` to judge by: held-out captions, if any, and others in turn."""
        rng = np.random.default_rng(0)
        orders = [rng.permutation(rows) for rows in (self.held_out, self.rows) if len(rows)]
        rows = np.stack([np.resize(order, count) for order in orders], axis=1).ravel()[:count]
        return np.stack([self.reader.encode(self.captions[row]) for row in rows])

    def pairs(self, rows: Sequence[int]) -> tuple[np.ndarray, list[str]]:
        """Examples of some rows of the source and their captions; broken images are left out."""
        examples, captions = [], []
        for row in map(int, rows):
            try:
                examples.append(self.source[row]["example"])
            except BrokenImage:
                continue
            captions.append(self.captions[row])
        return np.stack(examples), captions


def captioned(source) -> Captioned | None:
    """The captions of a source, whatever wraps it; None if there are none."""
    while source is not None and not isinstance(source, Captioned):
        source = getattr(source, "source", None)
    return source


def conditions_to_judge(experiment: Experiment, source, count: int):
    """Raw conditions of samples to judge, `[count]`: all that there are in turn, or those of the
    data, of which texts cannot be listed.
    """
    conditioner, found = experiment.network.conditioner, captioned(source)
    if source is None or not isinstance(conditioner, Reader):
        return conditioner.in_turn(count)
    return found.in_turn(count) if found else _some_conditions(source, count)


def conditions_to_show(experiment: Experiment, source):
    """What grids are drawn for: what is asked for, or, of texts without a prompt, some of the
    data.
    """
    sample = experiment.sample
    if sample.prompt or sample.mix or not isinstance(experiment.network.conditioner, Reader):
        return experiment.sample_conditions
    return _some_conditions(source, sample.count)


def _some_conditions(source, count: int) -> np.ndarray:
    return np.stack([source[int(row)]["condition"] for row in any_rows(source, count)])


def any_rows(source, count: int) -> np.ndarray:
    """Numbers of some examples, always the same ones: `[count]`."""
    return np.resize(np.random.default_rng(0).permutation(len(source)), count)


def _place(caption) -> float:
    """From 0 to 1, by a hash of a caption."""
    data = caption.encode() if isinstance(caption, str) else np.asarray(caption).tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big") / 2**32


def open_captions(source, path, where: str, settings, data, reader: Reader) -> Source:
    """A source with the captions that `data.captions` says; one that delivers its own as it is.

    Raises:
        DataError: there are none, not all of them, or some that cannot be read.
    """
    kind, name = settings.source, data.captions or CAPTIONS.get(settings.source, "")
    from_files = kind in ("tar", "folder")
    if kind == "npz":
        found = of_arrays(path, where, data.captions, len(source), reader)
    elif isinstance(reader, Text) and from_files:
        texts = source.records.captions if kind == "tar" else _of_json(path, name, source)
        found = check_texts(texts, source.key, f'{where} (data.captions "{name}")')
    elif isinstance(reader, Text) and kind == "latents" and source.captions:
        found = source.captions
    elif kind not in (*CAPTIONS, "latents") and not data.captions and not data.held_out:
        return source
    else:
        raise DataError(
            f"{where} has no captions that can be read: texts are read of npz files, folders, "
            "tar files and latent caches made with model.condition text, outputs of a "
            "text encoder of npz files; name another model.condition or data.source."
        )
    return Captioned(source, found, reader, data.held_out, where)


def check_texts(found: Sequence, key: Callable[[int], str], where: str) -> list[str]:
    """Captions, as bytes or texts, without blanks at their ends; DataError unless all can be read.

    None stands for one that is missing.
    """
    texts = []
    for index, text in enumerate(found):
        try:
            data = text if isinstance(text, bytes) else (text or "").encode()
            texts.append(data.decode().strip())
        except (UnicodeError, AttributeError) as error:
            raise DataError(
                f"{where}: the caption of {key(index)} is no text in UTF-8; write it anew."
            ) from error
    missing = [index for index, text in enumerate(texts) if not text]
    if missing:
        raise DataError(
            f"{where}: {len(missing):,} of {len(texts):,} examples have no caption or an empty "
            f"one, the first is {key(missing[0])}; add what is missing, or take them out."
        )
    return texts


def _of_json(folder: str, name: str, source) -> list:
    """Captions of examples by their names in a JSON file of their folder."""
    path = pathlib.Path(folder, name)
    try:
        texts = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f'{path} cannot be read ({error}); write captions as {{"FILE": "CAPTION"}}, or name '
            "their file with --config.data.captions."
        ) from error
    return [texts.get(source.key(index)) for index in range(len(source))]


def of_arrays(path, where: str, name: str, count: int, reader: Reader) -> Sequence:
    """Texts of an array in an npz file, or outputs of a text encoder `[n, L, channels]`."""
    is_text = isinstance(reader, Text)
    name = name or (CAPTIONS["npz"] if is_text else "embeddings")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = file[name]
    except Exception as error:  # damaged files make numpy fail in ways that nobody has listed
        raise DataError(
            f'{where} has no array "{name}" (data.captions) that can be read: {error}'
        ) from error
    fits = found.dtype.kind in "US" if is_text else found.dtype.kind == "f"
    wanted = (count,) if is_text else (count, "L", reader.channels)
    shape = found.shape if is_text or found.ndim != 3 else (len(found), "L", found.shape[2])
    if not fits or shape != wanted:
        raise DataError(
            f'{where} has "{name}" of {found.dtype} and shape {list(found.shape)}; it needs '
            f"{'texts' if is_text else 'floats'} [{', '.join(map(str, wanted))}]."
        )
    if is_text:
        return check_texts(found.tolist(), str, f'{where}, "{name}"')
    if not np.isfinite(found).all():
        raise DataError(f'{where} has values in "{name}" that are not finite; make it again.')
    return found
