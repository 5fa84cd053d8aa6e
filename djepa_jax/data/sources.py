"""Data sources by name, and opening one, checked against the configuration."""

import inspect
from collections.abc import Callable

import numpy as np

from djepa_jax.checkpoints.autoencoder import weights_sha256
from djepa_jax.config.class_names import resolve
from djepa_jax.config.convert import check_options
from djepa_jax.config.experiment import Experiment
from djepa_jax.core.modalities.base import Modality
from djepa_jax.core.modalities.image import ImagePixels
from djepa_jax.core.modalities.video import VideoPixels
from djepa_jax.core.models.conditioning import Classes, Nothing, Sum
from djepa_jax.core.models.text import Reader
from djepa_jax.data.arrays import Synthetic, load_digits, load_npz
from djepa_jax.data.captions import CAPTIONS, open_captions
from djepa_jax.data.ilsvrc import open_ilsvrc
from djepa_jax.data.image_folder import open_folder
from djepa_jax.data.latent_cache import (
    LatentCache,
    check_cache,
    latents_made_by,
    local_cache,
    read_metadata,
)
from djepa_jax.data.moving_mnist import MovingMNIST
from djepa_jax.data.paired import Paired
from djepa_jax.data.records import (
    ANY_CLASS,
    DataError,
    ImageSource,
    SkipBroken,
    Source,
    check_labels,
    unwrapped,
)
from djepa_jax.data.sounds import load_sounds, open_wavs
from djepa_jax.data.tfds import open_tfds
from djepa_jax.data.webdataset import open_tars
from djepa_jax.runtime.staging import local_copy
from djepa_jax.runtime.storage import PathError, as_path, check_local, is_remote

IMAGE_FILES = {"folder": open_folder, "tar": open_tars, "ilsvrc": open_ilsvrc, "tfds": open_tfds}
MOVING = ("folder", "tar")  # of these, which may hold animations
FROM_FILES = ("npz", "latents", *IMAGE_FILES)
# Sources that need no path; `data.source_options` are their keyword arguments:
# (path, "" if there is none; modality; number of classes, 0 if the data say it) -> source
SOURCES: dict[str, Callable[..., Source]] = {
    "digits": lambda path, modality, num_classes: load_digits(),
    "synthetic": lambda path, modality, num_classes: Synthetic(modality, num_classes),
    "moving_mnist": MovingMNIST,
    "paired": Paired,
}


def open_source(
    group: str,
    settings,
    data,
    modality,
    any_class: bool = False,
    reader: Reader | None = None,
) -> Source:
    """The source that `settings` name, which are `config.data` or `config.prepare` as `group` says.

    Its classes must be those of `data`, unless there may be `any_class`, and its examples those of
    the modality, to which images in files are cropped; a broken one of these raises BrokenImage.
    For a `reader`, examples have captions, and need no labels.
    """
    name, path = settings.source, settings.path
    where = f'{group}.path "{path}"' if path else f'{group}.source "{name}"'
    if name not in (known := (*SOURCES, *FROM_FILES)):
        raise DataError(f'{group}.source is "{name}"; it must be one of {", ".join(known)}.')
    options = data.source_options if group == "data" else {}
    check_options("data.source_options", options, _options_of(name), f'the source "{name}"')
    if not names_data(settings):
        raise DataError(
            f'{group}.path is empty, and {group}.source is "{name}"; name its data with '
            f"--config.{group}.path=PATH (--mode=prepare makes the latents of images)."
        )
    num_classes = ANY_CLASS if any_class or data.unconditional else data.num_classes
    names = data.labels.split(",") if data.labels else []
    is_sound = modality.example_dtype == np.int16 and name in ("npz", "folder")
    if names and not is_sound and name != "npz":
        raise DataError(
            f'data.labels is "{data.labels}", which is for npz files and sounds; leave it out.'
        )
    if is_sound and name == "folder":
        check_local(path, f"--config.{group}.path")
        source = open_wavs(path, where, names, data.class_names, num_classes, modality)
    elif is_sound:
        path = local_copy(path, data.staging, f"{group}.path")
        source = load_sounds(path, where, names or ["labels"], modality)
    elif name in IMAGE_FILES:
        source = _open_images(name, path, where, data, num_classes, modality, reader)
    elif name == "npz":
        path = local_copy(path, data.staging, f"{group}.path")
        source = load_npz(path, where, names if names or reader else ["labels"])
    elif name == "latents":
        source = LatentCache(local_cache(path, data.staging))
    else:
        path = path and local_copy(path, data.staging, f"{group}.path")
        source = SOURCES[name](path, modality, num_classes, **options)
    limit = num_classes or len(resolve(data.class_names, 0)) or ANY_CLASS
    check_labels(source.labels, limit, f"{where} holds examples")
    if is_sound or name not in IMAGE_FILES:
        modality.check_example(source[0]["example"])
    return open_captions(source, path, where, settings, data, reader) if reader else source


def names_data(settings) -> bool:
    """Whether `config.data` or `config.prepare` say where data lie, or take some that lie here."""
    return bool(settings.path) or settings.source in SOURCES


def _options_of(name: str) -> set[str]:
    """The keyword arguments that a source has."""
    parameters = inspect.signature(SOURCES[name]).parameters.values() if name in SOURCES else ()
    return {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}


def _open_images(
    name: str, path: str, where: str, data, num_classes: int, modality, reader
) -> ImageSource:
    if is_remote(path):
        raise PathError(
            f'{where} lies in a bucket, which the source "{name}" does not read; copy it to a '
            "local disk, encode it there with --mode=prepare, and copy the latent cache to the "
            "bucket: gcloud storage cp -r CACHE gs://BUCKET/CACHE."
        )
    shape = modality.example_shape
    clips = len(shape) == 4
    fits = modality.example_dtype == np.uint8 and len(shape) in (3, 4) and shape[-3] == shape[-2]
    if not fits or shape[-1] not in (1, 3) or (clips and name not in MOVING):
        kinds = "images or clips" if name in MOVING else "images"
        raise DataError(
            f'the source "{name}" gives square uint8 {kinds} with 1 or 3 channels, the config '
            f"expects {modality.example_dtype} examples of shape {shape}; choose another "
            'data.modality or data.channels, or data.source "npz".'
        )
    if reader and name == "tar":
        records = open_tars(path, where, f".{(data.captions or CAPTIONS[name]).lstrip('.')}")
    elif clips and name == "folder":
        records = open_folder(path, where, clips)
    else:
        records = IMAGE_FILES[name](path, where)
    return ImageSource(records, shape, num_classes, data.class_names, where)


def pictures_of(experiment: Experiment) -> Modality:
    """The images or clips that `config.prepare` names, of which an autoencoder makes latents."""
    size, frames = experiment.prepare.image_size, getattr(experiment.modality, "num_frames", 0)
    return VideoPixels(frames, size, 3, 1, 1) if frames else ImagePixels(size, 3, 1)


def open_data(experiment: Experiment) -> Source:
    """The source that `config.data` names, checked against all of it."""
    data, modality = experiment.data, experiment.modality
    reader = reader_of(experiment)
    if data.source == "latents" and data.path:  # before a copy, which may take long
        check_cache(read_metadata(as_path(data.path)), data, reader is not None)
    any_class = reader is not None or isinstance(experiment.network.conditioner, Nothing)
    source = open_source("data", data, data, modality, any_class, reader)
    if isinstance(unwrapped(source), ImageSource):
        source = SkipBroken(source, data.max_broken)
    pixels = modality.example_dtype == np.uint8
    if data.random_flip and len(modality.example_shape) < 3:
        raise DataError("data.random_flip is for pictures, not sound; set it to False.")
    if data.random_flip and not pixels and "mirror" not in source[0]:
        raise DataError(
            f'data.random_flip is True, but data.path "{data.path}" holds latents without those of '
            "the mirror images, which only an autoencoder can make; set "
            "--config.data.random_flip=False, or use a cache that --mode=prepare made."
        )
    if data.unconditional:
        return SingleClass(source)
    _check_pairs(source, experiment.network.conditioner, data.labels)
    if reader is not None:
        _check_texts(source[0]["condition"], reader, experiment.model.condition)
    return source


def reader_of(experiment: Experiment) -> Reader | None:
    """What reads the captions of the data; None for a model of classes or of nothing."""
    conditioner, data = experiment.network.conditioner, experiment.data
    reads = isinstance(conditioner, Reader)
    if data.unconditional if reads else data.captions or data.held_out:
        raise DataError(
            f'model.condition is "{experiment.model.condition}", data.captions "{data.captions}", '
            f"data.held_out {data.held_out} and data.unconditional {data.unconditional}; captions "
            "are for model.condition text or embeddings, and these not for data.unconditional."
        )
    return conditioner if reads else None


def _check_texts(found, conditioner: Reader, name: str) -> None:
    """Raise DataError unless a condition of the data has the shape of those that a model reads."""
    shape = conditioner.null(1).shape[1:]
    if np.shape(found) != shape:
        raise DataError(
            f'model.condition "{name}" reads arrays of shape {shape}, and the data deliver '
            f"{np.shape(found)}; name another condition, or a source that delivers them "
            "(docs/text.md)."
        )


def _check_pairs(source: Source, conditioner, labels: str) -> None:
    """Raise DataError unless examples have a second label if, and only if, a model takes one."""
    found, pairs = getattr(source, "all_labels", [source.labels]), isinstance(conditioner, Sum)
    if len(found) != 1 + pairs:
        raise DataError(
            f'data.labels is "{labels}", and model.condition takes {1 + pairs} for each example; '
            'name as many, such as --config.data.labels=digit,speaker for "class_pair".'
        )
    if pairs and isinstance(conditioner.second, Classes):
        count, wanted = len(np.unique(found[1])), conditioner.second.num_classes
        if count != wanted:
            raise DataError(
                f"the data have {count} second labels, and model.condition_options.second_classes "
                f"is {wanted}; set it to {count}."
            )


def open_training_data(experiment: Experiment) -> tuple[Source, Experiment]:
    """The data, and the configuration with their classes and the autoencoder of their latents."""
    # The weights come before the data, whose copying may take long.
    decoder = weights_sha256(experiment) if experiment.has_decoder else ""
    source = open_data(experiment)
    if experiment.modality.needs_decoder:
        made_by = latents_made_by(source, experiment.autoencoder, decoder)
        experiment = experiment.decoded_by(made_by)
    return source, with_classes_of(source, experiment)


def with_classes_of(source: Source, experiment: Experiment) -> Experiment:
    """The configuration with the number and the names of the classes that a source has."""
    names, labels = source.class_names, source.labels
    told = experiment.data.num_classes or isinstance(experiment.network.conditioner, Reader)
    if names is None and labels is None and not told:
        raise DataError(
            "config.data.num_classes is 0, and the data do not say how many classes they have; "
            "set it."
        )
    count = len(names) if names else 0 if labels is None else int(np.max(labels)) + 1
    return experiment.with_classes(count, names)


class SingleClass(Source):
    """A source whose examples all count to class 0."""

    labels = np.zeros(1, np.int64)

    def __init__(self, source: Source):
        self.source, self.key = source, source.key

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        return {**self.source[index], "condition": np.int32(0)}
