"""A latent cache in a bucket, and copies of it."""

import pathlib

from caches import write_cache
from object_store import ObjectStore

from djepa_jax.data.latent_cache import local_cache
from djepa_jax.runtime import staging

URL = "gs://bucket/data/cache"
LATENTS = (
    "--config.data.source=latents",
    f"--config.data.path={URL}",
    "--config.data.modality=image_latents",
    "--config.data.image_size=4",
    "--config.data.channels=3",
    "--config.data.patch_size=2",
    "--config.data.num_classes=3",
    "--config.data.class_names=",
    "--config.data.latent_scale=0.25",
    "--config.data.latent_shift=-0.5",
    "--config.evaluation.kind=none",
    "--config.sample.num_ar_steps=2",
)
NAMES = [f"{number:05d}-of-00003.array_record" for number in range(3)]


def upload(store: ObjectStore, folder: pathlib.Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.objects[f"data/cache/{path.relative_to(folder)}"] = path.read_bytes()


def with_cache(store: ObjectStore, folder: pathlib.Path) -> ObjectStore:
    """The bucket with a latent cache in it, which is written to a folder first."""
    store.objects.clear()
    upload(store, write_cache(folder))
    store.requests.clear()
    staging._copied.cache_clear()
    return store


def copy_anew(store: ObjectStore, folder: pathlib.Path) -> pathlib.Path:
    """Copy the cache as the next process would; the copy."""
    staging._copied.cache_clear()
    store.requests.clear()
    return local_cache(URL, str(folder))


def downloaded(store: ObjectStore) -> list[str]:
    """The objects whose content was asked for, but for the metadata, which every start reads."""
    names = {request.rpartition("/")[2] for request in store.requests if "/download/" in request}
    return sorted(names - {"metadata.json"})


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """What a copy holds, without notes."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {f"data/cache/{path.relative_to(folder)}": path.read_bytes() for path in found}
