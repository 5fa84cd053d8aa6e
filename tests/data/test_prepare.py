"""Making a latent cache: what goes into it, what is measured and left out, completing one, and what
is refused.
"""

import itertools
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from photos import (
    NAMES,
    crop,
    encode,
    labelled,
    opened,
    same,
    with_broken,
    write_folder,
    write_ilsvrc,
    write_shards,
)
from small_autoencoder import (
    FLAGS,
    PIXELS,
    files_of,
    folder_config,
    registered,
    write_weights,
)
from tiny import CONFIGS, load_config

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.checkpoints.convert.mismatch import MismatchError
from djepa_jax.checkpoints.convert.tensor_files import SourceError
from djepa_jax.config.experiment import ConfigError
from djepa_jax.core import sharding
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data import records
from djepa_jax.data.images import center_crop, decode_image
from djepa_jax.data.latent_cache import DTYPES, LatentCache, unpack
from djepa_jax.data.prepare_latents import run_prepare
from djepa_jax.data.records import MAX_PIXELS, DataError
from djepa_jax.data.sources import open_data
from djepa_jax.main import main
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import PathError

COUNT = len(labelled())


@pytest.fixture(scope="module", autouse=True)
def small():
    with registered():
        yield


@pytest.fixture
def config(tmp_path):
    """Settings for a cache of twelve images in three shards."""
    return folder_config(tmp_path)


@pytest.fixture
def cache(config, tmp_path) -> pathlib.Path:
    run_prepare(config, str(tmp_path / "cache"), say=lambda text: None)
    return tmp_path / "cache"


def read(folder: pathlib.Path) -> tuple[np.ndarray, list[int], list[str]]:
    """Moments of images and mirror images `[n, 2, h, w, 2c]`, labels, keys."""
    source = LatentCache(folder)
    shape, dtype = source.metadata.shape, DTYPES[source.metadata.dtype]
    found = [unpack(source._records[i], shape, dtype) for i in range(len(source))]
    labels, keys, moments = zip(*found, strict=True)
    return np.array(moments), list(labels), list(keys)


def pixels() -> np.ndarray:
    return np.array(
        [center_crop(decode_image(data, MAX_PIXELS), PIXELS) for _, data, _ in labelled()]
    )


# what a cache holds


def test_cache_holds_the_moments_of_every_image_and_its_mirror_image(config, tmp_path):
    expected = Autoencoder(config.autoencoder, sharding.make_mesh((-1, 1, 1))).encode(pixels())
    for dtype in DTYPES:
        lines, folder = [], tmp_path / dtype
        changed = config.updated({"prepare.dtype": dtype})
        metadata = run_prepare(changed, str(folder), say=lines.append)
        moments, labels, keys = read(folder)
        assert same(moments, expected.astype(DTYPES[dtype]))
        assert labels == [label for _, _, label in labelled()]
        assert keys == [f"{key}.jpg" for key, _, _ in labelled()]
    assert metadata.count == COUNT and [shard.count for shard in metadata.shards] == [5, 5, 2]
    counts = [{"0": 5}, {"0": 1, "1": 4}, {"1": 2}]
    assert [shard.class_counts for shard in metadata.shards] == counts
    assert metadata.class_names == NAMES and metadata.image_size == PIXELS
    assert "12 images of 2 classes in 3 shards; 0 could not be read" in lines[-1]


def test_every_source_gives_the_same_moments(config, cache, tmp_path):
    moments, labels, keys = read(cache)
    wnids = ("n01440764", "n01443537")
    archive = {wnid: {} for wnid in wnids}
    for key, data, label in labelled():
        archive[wnids[label]][f"{key[-3:]}.JPEG"] = data
    np.savez(tmp_path / "x.npz", images=pixels(), labels=labels)
    for source, path in {
        "tar": write_shards(tmp_path / "tars"),
        "ilsvrc": write_ilsvrc(tmp_path / "archive", archive),
        "npz": str(tmp_path / "x.npz"),
    }.items():
        changes = {"prepare.source": source, "prepare.path": path, "data.num_threads": 1}
        run_prepare(config.updated(changes), str(tmp_path / source))
        others, found, names = read(tmp_path / source)
        order = list(range(COUNT))
        if source == "tar":
            order = [names.index(next(n for n in names if n.endswith(key))) for key in keys]
        assert same(others[order], moments) and [found[i] for i in order] == labels, source


def test_labels_and_names_are_those_of_the_config(config, cache, tmp_path):
    (tmp_path / "names").write_text("Blume\nTempel")
    named = config.updated({"data.class_names": str(tmp_path / "names")})
    assert run_prepare(named, str(tmp_path / "named")).class_names == ("Blume", "Tempel")
    wnids = ("n01443537", "n02099601")
    images = [(f"{wnids[label]}/{key[-3:]}", data, label) for key, data, label in labelled()]
    changes = {"prepare.path": write_folder(tmp_path / "two of them", images)}
    changes |= {"data.num_classes": 1000, "data.class_names": "imagenet"}
    metadata = run_prepare(config.updated(changes), str(tmp_path / "new"))
    moments, labels, _ = read(tmp_path / "new")
    assert labels == [(1, 207)[label] for _, _, label in labelled()]
    assert same(moments, read(cache)[0])
    assert metadata.num_classes == 1000 and metadata.class_names[207] == "golden retriever"


def test_captions_are_kept(config, cache, tmp_path):
    keys, folder = [f"{key}.jpg" for key, _, _ in labelled()], str(tmp_path / "new")
    file = pathlib.Path(config.prepare.path, "captions.json")
    file.write_text(json.dumps({key: f"this is {key}" for key in keys}))
    (file.parent / keys[2]).write_bytes(b"no picture")
    text = config.updated({"model.condition": "text"})
    metadata = run_prepare(text, folder)
    shown = [f"this is {key}" for key in keys if key != keys[2]]
    assert [caption for shard in metadata.shards for caption in shard.captions] == shown
    assert read(folder)[2] == [*keys[:2], *keys[3:]] and metadata.class_names == NAMES
    data = {"data.path": folder, "data.num_classes": 0, "data.class_names": ""}
    source = open_data(text.updated(data | {"data.held_out": 0.3}))
    decode = text.network.conditioner.decode
    for index in range(len(source)):
        assert decode(source[index]["condition"]) == f"this is {source.key(index)}"
    assert len(source) + len(source.held_out) == COUNT - 1
    plain = config.updated(data)
    assert [int(open_data(plain)[i]["condition"]) for i in (0, COUNT - 2)] == [0, 1]
    with pytest.raises(DataError, match="no captions that can be read"):
        open_data(text.updated(data | {"data.path": str(cache)}))
    file.write_text(json.dumps({key: "other" for key in keys}))
    with pytest.raises(DataError, match="contents"):
        run_prepare(text, folder)
    with pytest.raises(ConfigError, match="captions as texts"):
        run_prepare(config.updated({"model.condition": "embeddings"}), folder)


def test_an_unconditional_recipe_makes_a_cache_of_one_class(config, cache, tmp_path):
    flags = f"""
        --config.data.image_size=8 --config.data.channels=4 --config.prepare.image_size={PIXELS}
        --config.autoencoder.name=small --config.autoencoder.path={config.autoencoder.path}
        --config.prepare.path={config.prepare.path} --config.prepare.dtype=float32
        --config.sample.num_ar_steps=4
    """.split()
    recipe = f"--config={CONFIGS}/djepa_l.py:unconditional"
    assert main(["djepa_jax", "--mode=prepare", recipe, f"--workdir={tmp_path}/new", *flags]) == 0
    moments, labels, keys = read(tmp_path / "new")
    metadata = LatentCache(tmp_path / "new").metadata
    assert same(moments, read(cache)[0]) and labels == [0] * COUNT and keys == read(cache)[2]
    assert metadata.num_classes == 1 and metadata.class_names == ("0",)
    for folder in (tmp_path / "new", cache):  # one with classes will do as well
        found = load_config("djepa_l:unconditional", *flags, f"--config.data.path={folder}")
        source = open_data(found)
        assert {int(source[i]["condition"]) for i in range(COUNT)} == {0}


def test_measured_scale_standardises_the_latents_and_stays(config, cache, tmp_path, capsys):
    places = {"prepare": config.prepare.path, "autoencoder": config.autoencoder.path}
    flags = [f"--config.{group}.path={path}" for group, path in places.items()]
    workdir, file = f"--workdir={tmp_path}/new", f"--config={CONFIGS}/default.py"
    arguments = ["djepa_jax", "--mode=prepare", workdir, file, *FLAGS, *flags]
    assert main([*arguments, "--measure-scale"]) == 0
    metadata, given = LatentCache(tmp_path / "new").metadata, LatentCache(cache).metadata
    assert (given.scale, given.shift) == (0.2325, 0.0), "of the config"
    assert (metadata.scale, metadata.shift) == (1 / metadata.measured_std, metadata.measured_mean)
    said = capsys.readouterr().out
    assert f"--config.data.latent_scale={metadata.scale!r}" in said
    assert f"--config.data.latent_shift={metadata.shift!r}" in said
    modality = MODALITIES["image_latents"](8, 4, 1, metadata.scale, metadata.shift)
    values = {"image_size": 8, "channels": 4, "latent_scale": metadata.scale}
    opened("latents", tmp_path / "new", 2, modality, latent_shift=metadata.shift, **values)
    moments = read(cache)[0].astype(np.float64)
    mean, log_variance = np.split(moments, 2, axis=-1)
    assert given.measured_mean == pytest.approx(mean.mean(), abs=1e-9)
    deviation = np.sqrt(mean.var() + np.exp(log_variance).mean())
    assert given.measured_std == pytest.approx(deviation, rel=1e-9)
    moments = moments.reshape(-1, 8, 8, 8).astype(np.float32)
    assert modality.tokenize(moments, jax.random.key(0)).std() == pytest.approx(1, abs=0.02)
    assert main(arguments) == 0
    assert LatentCache(tmp_path / "new").metadata == metadata, "a finished cache keeps its scale"
    (tmp_path / "new" / "metadata.json").unlink()
    assert main(arguments) == 0
    assert LatentCache(tmp_path / "new").metadata.scale == 0.2325


# broken images


@pytest.fixture
def broken(config, tmp_path):
    """A folder where the first image and all of the last shard are cut off."""
    folder = write_folder(tmp_path / "broken", with_broken(0, 10, 11))
    return config.updated({"prepare.path": folder})


def test_broken_images_are_left_out_and_named(broken, cache, tmp_path):
    lines = []
    metadata = run_prepare(broken, str(tmp_path / "new"), say=lines.append)
    moments, labels, keys = read(tmp_path / "new")
    assert metadata.count == 9 and keys == [f"{key}.jpg" for key, _, _ in labelled()[1:10]]
    assert same(moments, read(cache)[0][1:10]) and labels == read(cache)[1][1:10]
    skipped = [["flower/000.jpg"], [], ["temple/004.jpg", "temple/005.jpg"]]
    assert [list(shard.skipped) for shard in metadata.shards] == skipped
    reasons = [reason for shard in metadata.shards for reason in shard.skipped.values()]
    assert all("cannot be decoded" in reason for reason in reasons)
    assert "9 images of 2 classes in 3 shards; 3 could not be read" in lines[-1]


def test_too_many_broken_images_are_an_error_and_what_is_finished_is_kept(broken, tmp_path):
    few, more = (broken.updated({"prepare.max_broken": count}) for count in (2, 3))
    with pytest.raises(DataError, match="3 of 12 images .* 2 are allowed: .*prepare.max_broken"):
        run_prepare(few, str(tmp_path / "new"))
    assert len(list((tmp_path / "new" / "shards").glob("*.array_record"))) == 2
    for share in ("0/3", "1/3"):  # neither sees too many alone
        assert run_prepare(few, str(tmp_path / "shared"), shard=share) is None
    with pytest.raises(DataError, match="3 of 12 images"):
        run_prepare(few, str(tmp_path / "shared"), shard="2/3")
    for name in ("new", "shared"):
        assert run_prepare(more, str(tmp_path / name)).count == 9


def test_names_need_not_be_unicode(config, tmp_path):
    folder = os.fsencode(tmp_path) + b"/more/caf\xe9"
    os.makedirs(folder)
    for name, data in ((b"/\xfe.jpg", labelled()[0][1]), (b"/\xff.jpg", b"broken")):
        with open(folder + name, "wb") as file:
            file.write(data)
    changed = config.updated({"prepare.path": str(tmp_path / "more"), "data.num_classes": 1})
    (shard,) = run_prepare(changed, str(tmp_path / "new")).shards
    assert read(tmp_path / "new")[2] == ["caf\udce9/\udcfe.jpg"]
    assert list(shard.skipped) == ["caf\udce9/\udcff.jpg"]


def test_storage_that_stays_away_leaves_nothing_out_and_the_command_can_be_repeated(
    config, cache, tmp_path, monkeypatch
):
    read_bytes = pathlib.Path.read_bytes

    def fail(path):
        if path.name == "005.jpg":
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(records, "WAITS", (0,))
        patch.setattr(pathlib.Path, "read_bytes", fail)
        with pytest.raises(DataError, match="flower/005.jpg cannot be read .*2 attempts"):
            run_prepare(config, str(tmp_path / "new"))
    assert len(list((tmp_path / "new" / "shards").glob("*.json"))) == 1, "the shard before it"
    assert run_prepare(config, str(tmp_path / "new")).count == COUNT
    assert files_of(tmp_path / "new") == files_of(cache)


# going on


def test_a_second_run_makes_nothing_anew_wherever_the_images_lie(
    config, cache, tmp_path, monkeypatch
):
    before = {path: path.stat().st_mtime_ns for path in (cache / "shards").iterdir()}
    files = files_of(cache)
    moved = pathlib.Path(config.prepare.path).rename(tmp_path / "mounted elsewhere")
    monkeypatch.setattr(Autoencoder, "encode", None)
    run_prepare(config.updated({"prepare.path": str(moved)}), str(cache))
    assert {path: path.stat().st_mtime_ns for path in (cache / "shards").iterdir()} == before
    changed = files.keys() - {"metadata.json"}  # which tells where they lie
    assert {name: files_of(cache)[name] for name in changed} == {n: files[n] for n in changed}


def test_cache_of_a_version_that_told_sources_by_their_path_goes_on(config, cache):
    plan = json.loads((cache / "plan.json").read_text())
    del plan["contents"], plan["num_frames"]
    (cache / "plan.json").write_text(json.dumps(plan | {"path": config.prepare.path}))
    assert run_prepare(config, str(cache)).count == COUNT
    (cache / "plan.json").write_text(json.dumps(plan | {"path": "elsewhere"}))
    with pytest.raises(DataError, match="holds a latent cache of something else"):
        run_prepare(config, str(cache))


def cut(content: bytes) -> bytes:
    return content[:-5]


def changed(content: bytes) -> bytes:
    if b'"count"' in content:
        return content.replace(b'"count": 5', b'"count": 6', 1)
    return content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]


def test_only_what_is_missing_or_damaged_is_made_anew(config, cache):
    files, shard = files_of(cache), "00001-of-00003.array_record"
    others = [other for other in (cache / "shards").iterdir() if other.name[:5] != "00001"]
    before = {other: other.stat().st_mtime_ns for other in others}
    for name, damage in itertools.product((shard, f"{shard}.json"), (None, cut, changed)):
        path = cache / "shards" / name
        whole = path.read_bytes()
        path.unlink() if damage is None else path.write_bytes(damage(whole))
        run_prepare(config, str(cache))
        assert files_of(cache) == files, (name, damage)
    assert {other: other.stat().st_mtime_ns for other in others} == before


def test_leftovers_of_another_run_do_no_harm(config, cache, tmp_path):
    shard, shards = "00001-of-00003.array_record", tmp_path / "new" / "shards"
    shards.mkdir(parents=True)
    for name in ("", ".12ab34cd.unfinished", ".json.12ab34cd.tmp"):
        (shards / (shard + name)).write_bytes(b"left over")
    run_prepare(config, str(tmp_path / "new"))
    assert files_of(tmp_path / "new") == files_of(cache)


def test_shares_make_the_same_cache_and_say_what_is_missing(config, cache, tmp_path):
    lines, folder = [], tmp_path / "new"
    for share in ("2/4", "3/4", "0/4"):
        assert run_prepare(config, str(folder), shard=share, say=lines.append) is None
    assert "1 of 3 shards are missing" in lines[-1]
    assert not (folder / "metadata.json").exists()
    with lock_workdir(folder, ".lock-0-of-4"):  # another process's share
        assert run_prepare(config, str(folder), shard="1/4").count == COUNT
        with pytest.raises(PathError, match="in use by process"):
            run_prepare(config, str(folder), shard="0/4")
    assert files_of(folder) == files_of(cache)
    for share in ("4/4", "1", "a/b", "-1/2"):
        with pytest.raises(ConfigError, match=f'--shard is "{share}"'):
            run_prepare(config, str(folder), shard=share)


# what is refused

CHANGES = {  # of what the plan tells -> key, and a value made from a path
    "examples": ("prepare.path", lambda path: write_folder(path, labelled()[:11])),
    "contents": (
        "prepare.path",
        lambda path: write_folder(path, [*labelled()[:11], ("temple/9", b"", 1)]),
    ),
    "shard_size": ("prepare.shard_size", lambda path: 4),
    "dtype": ("prepare.dtype", lambda path: "bfloat16"),
    "autoencoder_sha256": (
        "autoencoder.path",
        lambda path: write_weights(
            path.with_suffix(".safetensors"), **{"quant_conv.bias": np.zeros(8, np.float32)}
        ),
    ),
}


def test_another_plan_is_refused(config, cache, tmp_path):
    files = files_of(cache)
    for change, (key, make) in CHANGES.items():
        other = config.updated({key: make(tmp_path / change)})
        words = f"holds a latent cache of something else .*{change}: .* -> .*another --workdir"
        with pytest.raises(DataError, match=words):
            run_prepare(other, str(cache))
        assert files_of(cache) == files


def test_sizes_must_agree(config, tmp_path):
    for key, value in {
        "data.image_size": 4,
        "data.channels": 16,
        "prepare.image_size": 17,
    }.items():
        other = config.updated({key: value})
        with pytest.raises(ConfigError, match=rf"autoencoder small makes .*{value}"):
            run_prepare(other, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_unusable_weights_are_refused(config, tmp_path):
    surplus = write_weights(tmp_path / "surplus.safetensors", other=np.zeros(1, np.float32))
    bias = {"quant_conv.bias": np.full(8, np.nan, np.float32)}
    not_finite = write_weights(tmp_path / "nan.safetensors", **bias)
    for path, error, words in (
        ("", ConfigError, "autoencoder.path is empty"),
        ("/no such/file", SourceError, 'autoencoder.path "/no such/file" does not exist'),
        (surplus, MismatchError, "other +surplus"),
        (not_finite, DataError, "not finite .* weight"),
    ):
        with pytest.raises(error, match=words):
            run_prepare(config.updated({"autoencoder.path": path}), str(tmp_path / "new"))


def test_sources_that_do_not_fit_are_refused(config, tmp_path):
    npz, zeros = tmp_path / "images.npz", np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(npz, images=zeros, labels=np.zeros(3, int))
    folder = write_folder(tmp_path / "data", [("a/x", encode(crop("flower")), 0)])
    for source, path, words in (
        ("folder", folder, "1 classes"),
        ("npz", str(npz), r"\(8, 8, 3\).*\(16, 16, 3\)"),
        ("digits", "", r"\(8, 8, 1\)"),
    ):
        num_classes = 10 if source == "digits" else 2
        changes = {"prepare.source": source, "prepare.path": path, "data.num_classes": num_classes}
        with pytest.raises(ValueError, match=words):
            run_prepare(config.updated(changes), str(tmp_path / "new"))
        assert not (tmp_path / "new").exists()


def test_images_that_are_all_broken_are_an_error(config, tmp_path):
    folder = write_folder(tmp_path / "broken", with_broken(*range(COUNT)))
    with pytest.raises(DataError, match="none of the images .* can be read"):
        run_prepare(config.updated({"prepare.path": folder}), str(tmp_path / "new"))


def test_workdir_that_is_in_use_or_cannot_be_written(config, cache, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metadata.json").write_text('{"mine": 1}')
    with lock_workdir(cache), pytest.raises(PathError, match="is in use by process"):
        run_prepare(config, str(cache))
    for folder, words in (
        (str(cache / "plan.json"), "cannot be written"),
        ("gs://b/x", "rsync|cp"),
        (str(other), "metadata.json"),
    ):
        with pytest.raises(PathError, match=words):
            run_prepare(config, folder)
    assert [path.name for path in other.iterdir()] == ["metadata.json"]
