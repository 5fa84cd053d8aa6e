"""ImageNet (ILSVRC 2012) as a data set of TensorFlow Datasets, from the two tar files that
image-net.org hands out.

python -m djepa_jax.data.ilsvrc --tars=DIR --data_dir=DIR
"""

import argparse
import collections
import contextlib
import importlib.util
import os
import pathlib
import re
import resource
import shutil
import sys
import types
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from djepa_jax.config.class_names import imagenet
from djepa_jax.data.records import MAX_FILE_BYTES, DataError
from djepa_jax.data.tar_index import Member, walk_tar
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import check_writable

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
NAME, LOCK = "imagenet2012", ".imagenet2012.lock"
# What TensorFlow Datasets writes to before it is complete; it removes it after an error, but
# nothing does after a kill.
INCOMPLETE = re.compile(r"incomplete\.[A-Z0-9]{6}_\d+\.\d+\.\d+")


def prepare_tfds(manual_dir: str, data_dir: str) -> dict[str, dict[str, int] | int]:
    """Make `imagenet2012` in `data_dir`, for the source "tfds"; does nothing if it is there
    already.

    One process at a time does so in a folder; it first removes what one that was killed has left
    behind. The real data needs TensorFlow (`pip install tensorflow-cpu`) here, not for training: 23
    of its images, 22 CMYK files and a PNG file called JPEG, are encoded anew by it. Without them,
    as in a part of ImageNet, the same files come out without TensorFlow, which then only opens
    files.

    Args:
        manual_dir: holds ILSVRC2012_img_train.tar, a tar file of one tar file per class, and
            ILSVRC2012_img_val.tar.
        data_dir: where TensorFlow Datasets keeps data sets; about 160 GB.

    Returns:
        how many images there are: `{"train": {WordNet id: count}, "validation": count}`.

    Raises:
        DataError: a tar file is missing, damaged or of another layout, TensorFlow or room on the
            disk is needed, another process is at it, or what was prepared does not have as many
            images.
        PathError: `data_dir` cannot be written.
    """
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as recipe

    data_dir = os.path.expanduser(data_dir)
    files, root = _find_tars(manual_dir), pathlib.Path(data_dir) / NAME
    is_there = (root / str(recipe.Builder.VERSION)).exists()
    if not is_there:
        _check_room(files, root)
    train, special = _count_train(files[TRAIN], {*recipe.CMYK_IMAGES, *recipe.PNG_IMAGES})
    counts = {"train": train, "validation": _count_validation(files[VALIDATION])}
    has_tensorflow = importlib.util.find_spec("tensorflow") is not None
    if special and not has_tensorflow:
        raise DataError(
            f'"{files[TRAIN]}" holds {len(special)} images that TensorFlow must encode anew, such '
            f"as {special[0]}; "
            "pip install tensorflow-cpu, which training does not need."
        )
    with contextlib.ExitStack() as stack:
        if not is_there:
            stack.enter_context(_alone(data_dir))
            _remove_leftovers(root)
        if not has_tensorflow:
            stack.enter_context(_without_tensorflow(recipe))
        prepared = _prepare(recipe, manual_dir, data_dir)
    _compare(counts, prepared, data_dir)
    return counts


def _find_tars(manual_dir: str) -> dict[str, pathlib.Path]:
    files = {name: pathlib.Path(manual_dir).expanduser() / name for name in (TRAIN, VALIDATION)}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise DataError(
            f"ImageNet is made from {' and '.join(map(str, files.values()))}; missing: "
            f"{', '.join(missing)}. Download "
            "them from https://image-net.org/download-images (an account is needed) and leave "
            "them packed."
        )
    return files


def _leftovers(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of runs that were killed, or of one that runs now: only who holds the lock can
    tell.
    """
    entries = root.iterdir() if root.is_dir() else ()
    return sorted(
        entry
        for entry in entries
        if INCOMPLETE.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink()
    )


def _check_room(files: dict[str, pathlib.Path], root: pathlib.Path) -> None:
    """Raise DataError unless the disk has room for what the archives hold, leftovers counted as
    free.
    """
    needed = sum(file.stat().st_size for file in files.values())
    present = next(folder for folder in root.absolute().parents if folder.exists())
    old = sum(
        file.stat().st_size
        for folder in _leftovers(root)
        for file in folder.rglob("*")
        if file.is_file()
    )
    free = shutil.disk_usage(present).free + old
    if free < needed:
        raise DataError(
            f'the disk of "{root.parent}" has {free / 1e9:.1f} GB free, the data set takes '
            f"{needed / 1e9:.1f} GB, as much as "
            "its two archives; make room, or name another --data_dir."
        )


@contextlib.contextmanager
def _alone(data_dir: str) -> Iterator[None]:
    """Hold the folder for this process; raises PathError if another one prepares ImageNet there."""
    check_writable(data_dir, "--data_dir")
    with lock_workdir(data_dir, LOCK, what=f'--data_dir "{data_dir}"'):
        yield


def _remove_leftovers(root: pathlib.Path) -> None:
    for folder in _leftovers(root):
        print(f"removing {folder}, which a run that was killed has left behind", flush=True)
        shutil.rmtree(folder)


def _count_train(file: pathlib.Path, wanted: set[str]) -> tuple[dict[str, int], list[str]]:
    """Images per class, and which of the `wanted` ones are there."""
    known, counts, found = {wnid for wnid, _ in imagenet()}, collections.Counter(), []
    with open(file, "rb", buffering=0) as handle:
        for inner in walk_tar(handle.fileno(), str(file)):
            wnid = inner.name.removesuffix(".tar")
            if wnid not in known or wnid == inner.name:
                raise DataError(
                    f'"{file}" holds "{inner.name}"; it must hold one tar file per class, such as '
                    "n01440764.tar."
                )
            where = f"{file}:{inner.name}"
            for image in _images(handle, where, inner.offset, inner.offset + inner.size):
                counts[wnid] += 1
                found += {image.name} & wanted
    return dict(counts), found


def _images(handle: BinaryIO, where: str, *limits: int) -> Iterator[Member]:
    """The files in a tar of images. Raises DataError for one that no image has the size of: it
    would be read whole.
    """
    for image in walk_tar(handle.fileno(), where, *limits):
        if image.size > MAX_FILE_BYTES:
            raise DataError(
                f'"{image.name}" in "{where}" has {image.size} bytes, the limit is '
                f"{MAX_FILE_BYTES}; copy it again."
            )
        yield image


def _count_validation(file: pathlib.Path) -> int:
    with open(file, "rb", buffering=0) as handle:
        names = sorted(image.name for image in _images(handle, str(file)))
    # TensorFlow Datasets gives labels to sorted names by position, so a missing image would shift
    # all after it.
    expected = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(len(names))]
    wrong = next((name for name, right in zip(names, expected, strict=True) if name != right), None)
    if wrong is not None or not names:
        raise DataError(
            f'"{file}" must hold ILSVRC2012_val_00000001.JPEG and so on without a gap, it holds '
            f'"{wrong}"; copy it again.'
        )
    return len(names)


def _prepare(recipe: types.ModuleType, manual_dir: str, data_dir: str) -> dict[str, int]:
    """Let TensorFlow Datasets write its files; the number of images in each split."""
    import tensorflow_datasets as tfds

    builder = recipe.Builder(data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(
        manual_dir=os.path.expanduser(manual_dir), try_download_gcs=False
    )
    try:
        builder.download_and_prepare(download_config=config)
    except Exception as error:
        # What it, array_record and TensorFlow make of failed system calls; others are mistakes, and
        # their traceback helps.
        if not isinstance(error, (OSError, RuntimeError)) and not type(error).__module__.startswith(
            "tensorflow"
        ):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f'"{data_dir}/{NAME}" could not be written ({reason[:300]}). The disk may be full, or '
            "a limit on the size of files "
            "be reached. What was written is removed: make room or name another --data_dir, and "
            "run the same command again."
        ) from error
    return {name: split.num_examples for name, split in builder.info.splits.items()}


@contextlib.contextmanager
def _without_tensorflow(recipe: types.ModuleType) -> Iterator[None]:
    """Let the recipe open and remove files with Python; TensorFlow does nothing else for it but
    encode some images anew.
    """
    from tensorflow_datasets.core import shuffle
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

    gfile = types.SimpleNamespace(exists=os.path.exists, GFile=open, remove=os.remove)
    errors = types.SimpleNamespace(ResourceExhaustedError=())  # none of Python's
    stand_in = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile), errors=errors)
    modules = (imagenet_common, recipe, extractor, shuffle)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    originals = [module.tf for module in modules]
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (limits[1], limits[1])
        )  # above 1 GB a thousand are open at a time
        for module in modules:
            module.tf = stand_in
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for module, original in zip(modules, originals, strict=True):
            module.tf = original


def _compare(counts: dict, prepared: dict[str, int], data_dir: str) -> None:
    expected = {"train": sum(counts["train"].values()), "validation": counts["validation"]}
    found = {name: prepared.get(name, 0) for name in expected}
    if found != expected:
        raise DataError(
            f'the tar files hold {expected} images, "{data_dir}/{NAME}" was prepared with '
            f"{found}; remove that "
            "folder and prepare it again."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: returns 0, or 2 after an error that fits on a line."""
    parser = argparse.ArgumentParser(
        "python -m djepa_jax.data.ilsvrc", description="Prepare ImageNet for training."
    )
    parser.add_argument("--tars", required=True, help=f"folder of {TRAIN} and {VALIDATION}")
    parser.add_argument(
        "--data_dir", required=True, help="folder of the prepared data, about 160 GB"
    )
    arguments = parser.parse_args(argv)
    try:
        counts = prepare_tfds(arguments.tars, arguments.data_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    train = counts["train"]
    print(
        f"{sum(train.values()):,} training images of {len(train)} classes and "
        f"{counts['validation']:,} validation images"
    )
    print(
        "use them with --config.prepare.source=tfds "
        f"--config.prepare.path=imagenet2012@{arguments.data_dir}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
