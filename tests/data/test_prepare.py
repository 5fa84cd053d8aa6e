"""Making a latent cache: what goes into it, what is measured and left out, and completing one."""

import errno
import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from photos import NAMES, labelled, same, write_folder, write_shards
from small_autoencoder import FLAGS, PIXELS, cache_config, files_of, folder_config, registered
from tiny import CONFIGS, load_config

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.core import sharding
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data import records, shards
from djepa_jax.data.images import center_crop, decode_image
from djepa_jax.data.latent_cache import DTYPES, LatentCache
from djepa_jax.data.prepare_latents import run_prepare
from djepa_jax.data.records import MAX_PIXELS, DataError
from djepa_jax.data.sources import open_data
from djepa_jax.main import main

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
    source = LatentCache(str(folder))
    examples = [source[i] for i in range(len(source))]
    moments = np.array([(example["example"], example["mirror"]) for example in examples])
    return (
        moments,
        [int(example["condition"]) for example in examples],
        [source.key(i) for i in range(len(source))],
    )


# what a cache holds


@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_holds_the_moments_of_every_image_and_its_mirror_image(config, tmp_path, dtype):
    config.prepare.dtype = dtype
    lines = []
    metadata = run_prepare(config, str(tmp_path), say=lines.append)
    moments, labels, keys = read(tmp_path)
    pixels = np.array(
        [center_crop(decode_image(data, MAX_PIXELS), PIXELS) for _, data, _ in labelled()]
    )
    expected = Autoencoder(config.autoencoder, sharding.make_mesh((-1, 1, 1))).encode(pixels)
    assert same(moments, expected.astype(DTYPES[dtype]))
    assert labels == [label for _, _, label in labelled()] and keys == [
        f"{key}.jpg" for key, _, _ in labelled()
    ]
    assert metadata.count == COUNT and [shard.count for shard in metadata.shards] == [5, 5, 2]
    assert [shard.class_counts for shard in metadata.shards] == [
        {"0": 5},
        {"0": 1, "1": 4},
        {"1": 2},
    ]
    assert (
        metadata.class_names == NAMES and metadata.image_size == PIXELS and metadata.dtype == dtype
    )
    assert lines[-1].startswith("12 images of 2 classes in 3 shards; 0 could not be read")
    finished = [line for line in lines if "is finished; " in line]
    assert [line.partition(" images")[0] for line in finished] == [
        f"shard {i} of 3 is finished; {n} of 12" for i, n in enumerate((5, 10, 12))
    ]


def test_progress_is_said_within_shards_too(config, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PROGRESS_SECONDS", 0.0)
    config.autoencoder.batch_size, lines = 2, []
    monkeypatch.setattr(
        Autoencoder, "encode", lambda self, images: np.zeros((len(images), 2, 8, 8, 8), np.float32)
    )
    config.prepare.shard_size = 12
    run_prepare(config, str(tmp_path), say=lines.append)
    assert lines[0] == "8 of 12 images", (
        "when nothing is known of the speed but how long compiling took"
    )
    assert re.fullmatch(r"12 of 12 images, \d+ images/s, 0 s left", lines[1])


@pytest.mark.parametrize("num_threads", [1, 7])
def test_threads_change_nothing(config, cache, tmp_path, num_threads):
    config.data.num_threads = num_threads
    run_prepare(config, str(tmp_path / "new"))
    assert files_of(tmp_path / "new") == files_of(cache)


def test_batches_of_the_autoencoder_hold_whole_images_and_follow_one_another(
    broken, tmp_path, monkeypatch
):
    seen = []

    def encode(self, images):
        seen.append(images)
        return np.zeros((len(images), 2, 8, 8, 8), np.float32)

    monkeypatch.setattr(Autoencoder, "encode", encode)
    broken.prepare.shard_size = 12
    run_prepare(broken, str(tmp_path / "new"))
    pixels = np.array(
        [center_crop(decode_image(data, MAX_PIXELS), PIXELS) for _, data, _ in labelled()[1:10]]
    )
    assert [len(images) for images in seen] == [8, 1] and same(np.concatenate(seen), pixels)


# which classes


def test_labels_of_wordnet_ids_are_those_of_imagenet(config, cache, tmp_path):
    wnids = ("n01443537", "n02099601")
    images = [(f"{wnids[label]}/{key[-3:]}", data, label) for key, data, label in labelled()]
    config.prepare.path = write_folder(tmp_path / "two of them", images)
    config.data.num_classes, config.data.class_names = 1000, "imagenet"
    metadata = run_prepare(config, str(tmp_path / "new"))
    moments, labels, _ = read(tmp_path / "new")
    assert labels == [(1, 207)[label] for _, _, label in labelled()] and same(
        moments, read(cache)[0]
    )
    assert metadata.num_classes == 1000 and metadata.class_names[207] == "golden retriever"


def test_names_of_the_config_win_over_those_of_the_folders(config, tmp_path):
    (tmp_path / "names").write_text("Blume\nTempel")
    config.data.class_names = str(tmp_path / "names")
    assert run_prepare(config, str(tmp_path / "new")).class_names == ("Blume", "Tempel")


def test_an_unconditional_recipe_makes_a_cache_of_one_class(config, cache, tmp_path):
    settings = {
        "data.image_size": 8,
        "data.channels": 4,
        "prepare.image_size": PIXELS,
        "autoencoder.name": "small",
    }
    settings |= {
        "prepare.path": config.prepare.path,
        "autoencoder.path": config.autoencoder.path,
        "prepare.dtype": "float32",
    }
    flags = [
        f"--config.{key}={value}" for key, value in (settings | {"sample.num_ar_steps": 4}).items()
    ]
    recipe = f"--config={CONFIGS}/djepa_l.py:unconditional"
    assert main(["djepa_jax", "--mode=prepare", recipe, f"--workdir={tmp_path}/new", *flags]) == 0
    moments, labels, keys = read(tmp_path / "new")
    metadata = LatentCache(str(tmp_path / "new")).metadata
    assert same(moments, read(cache)[0]) and labels == [0] * COUNT and keys == read(cache)[2]
    assert metadata.num_classes == 1 and metadata.class_names == ("0",)
    modality = MODALITIES["image_latents"](8, 4, 1, 0.2325)
    for folder in (tmp_path / "new", cache):  # one with classes will do as well
        source = open_data(
            load_config("djepa_l:unconditional", *flags, f"--config.data.path={folder}"), modality
        )
        assert {int(source[i]["condition"]) for i in range(COUNT)} == {0}


def test_every_source_gives_the_same_moments(config, cache, tmp_path):
    config.prepare.source, config.prepare.path = "tar", write_shards(tmp_path / "tars")
    run_prepare(config, str(tmp_path / "of tars"))
    pixels = np.array(
        [center_crop(decode_image(data, MAX_PIXELS), PIXELS) for _, data, _ in labelled()]
    )
    np.savez(tmp_path / "x.npz", images=pixels, labels=[label for _, _, label in labelled()])
    config.prepare.source, config.prepare.path = "npz", str(tmp_path / "x.npz")
    run_prepare(config, str(tmp_path / "of arrays"))
    moments, labels, keys = read(cache)
    for folder in ("of tars", "of arrays"):
        others, found, names = read(tmp_path / folder)
        order = (
            [names.index(next(n for n in names if n.endswith(key))) for key in keys]
            if folder == "of tars"
            else range(COUNT)
        )
        assert same(others[list(order)], moments) and [found[i] for i in order] == labels


def test_mean_and_deviation_are_those_of_posterior_samples(cache):
    moments, metadata = read(cache)[0].astype(np.float64), LatentCache(str(cache)).metadata
    mean, log_variance = np.split(moments, 2, axis=-1)
    assert metadata.measured_mean == pytest.approx(mean.mean(), abs=1e-9)
    assert metadata.measured_std == pytest.approx(
        np.sqrt(mean.var() + np.exp(log_variance).mean()), rel=1e-9
    )
    samples = mean + np.exp(log_variance / 2) * np.random.default_rng(0).standard_normal(
        (100, *mean.shape)
    )
    assert metadata.measured_std == pytest.approx(samples.std(), rel=0.01)


def test_measured_scale_standardises_the_latents(config, cache, tmp_path, capsys):
    flags = [
        f"--config.prepare.path={config.prepare.path}",
        f"--config.autoencoder.path={config.autoencoder.path}",
        *FLAGS,
    ]
    arguments = [
        "djepa_jax",
        "--mode=prepare",
        f"--workdir={tmp_path}/new",
        f"--config={CONFIGS}/default.py",
        *flags,
    ]
    assert main([*arguments, "--measure-scale"]) == 0
    metadata, given = LatentCache(str(tmp_path / "new")).metadata, LatentCache(str(cache)).metadata
    assert (given.scale, given.shift) == (0.2325, 0.0), "of the config"
    assert (metadata.scale, metadata.shift) == (1 / metadata.measured_std, metadata.measured_mean)
    advice = [
        word for word in capsys.readouterr().out.split() if word.startswith("--config.data.latent_")
    ]
    data = cache_config("", "", f"--config.data.path={tmp_path}/new", *advice)
    modality = MODALITIES["image_latents"](8, 4, 1, data.data.latent_scale, data.data.latent_shift)
    assert len(open_data(data, modality)) == COUNT, "what was advised fits"
    moments = read(cache)[0].reshape(-1, 8, 8, 8)
    assert abs(modality.tokenize(moments).mean()) < 1e-3
    assert modality.tokenize(moments, jax.random.key(0)).std() == pytest.approx(1, abs=0.02)


def test_a_measured_scale_stays_until_told_otherwise(config, cache, tmp_path):
    run_prepare(config, str(cache), measure_scale=True, say=lambda text: None)
    measured, lines = files_of(cache), []
    metadata = run_prepare(config, str(cache), say=lines.append)
    assert files_of(cache) == measured and metadata.scale == 1 / metadata.measured_std
    (told,) = [line for line in lines if "keeps its scale" in line]
    assert (
        f"scale {metadata.scale!r} and shift {metadata.shift!r} (the config has 0.2325 and 0.0"
        in told
    )
    assert f"when {cache}/metadata.json is removed" in told
    (cache / "metadata.json").unlink()
    metadata = run_prepare(config, str(cache), say=lines.append)
    assert (metadata.scale, metadata.shift) == (0.2325, 0.0)


# broken images


@pytest.fixture
def broken(config, tmp_path):
    """A folder where the first image and all of the last shard are cut off."""
    whole = [
        (key, data[: len(data) // 2] if i in (0, 10, 11) else data, label)
        for i, (key, data, label) in enumerate(labelled())
    ]
    changed = config.copy_and_resolve_references()
    changed.prepare.path = write_folder(tmp_path / "broken", whole)
    return changed


def test_broken_images_are_left_out_and_named(broken, cache, tmp_path):
    lines = []
    metadata = run_prepare(broken, str(tmp_path / "new"), say=lines.append)
    moments, labels, keys = read(tmp_path / "new")
    assert metadata.count == len(keys) == 9 and keys == [
        f"{key}.jpg" for key, _, _ in labelled()[1:10]
    ]
    assert same(moments, read(cache)[0][1:10]) and labels == read(cache)[1][1:10]
    assert [list(shard.skipped) for shard in metadata.shards] == [
        ["flower/000.jpg"],
        [],
        ["temple/004.jpg", "temple/005.jpg"],
    ]
    assert all(
        "cannot be decoded" in reason
        for shard in metadata.shards
        for reason in shard.skipped.values()
    )
    assert "9 images of 2 classes in 3 shards; 3 could not be read" in lines[-1]


def test_too_many_broken_images_are_an_error_and_what_is_finished_is_kept(broken, tmp_path):
    broken.prepare.max_broken = 2
    for _ in range(2):  # those of finished shards count
        with pytest.raises(
            DataError,
            match=r"too many .*: 2 of the latest 2, .* only 1 more: temple/004.jpg: .*; temple/005.jpg: ",
        ):
            run_prepare(broken, str(tmp_path / "new"))
        assert len(list((tmp_path / "new" / "shards").glob("*.array_record"))) == 2
    broken.prepare.max_broken = 3
    lines = []
    assert run_prepare(broken, str(tmp_path / "new"), say=lines.append).count == 9
    assert lines[0] == "2 of 3 shards are finished already"


def test_names_need_not_be_unicode(config, tmp_path):
    folder = os.fsencode(tmp_path) + b"/more/caf\xe9"
    os.makedirs(folder)
    for name, data in ((b"/\xfe.jpg", labelled()[0][1]), (b"/\xff.jpg", b"broken")):
        with open(folder + name, "wb") as file:
            file.write(data)
    config.prepare.path, config.data.num_classes = str(tmp_path / "more"), 1
    (shard,) = run_prepare(config, str(tmp_path / "new")).shards
    assert read(tmp_path / "new")[2] == ["caf\udce9/\udcfe.jpg"] and list(shard.skipped) == [
        "caf\udce9/\udcff.jpg"
    ]


def test_broken_images_of_all_shards_count_whoever_made_them(broken, tmp_path):
    run_prepare(broken, str(tmp_path / "new"))
    broken.prepare.max_broken = 2
    with pytest.raises(
        DataError,
        match=r"too many images cannot be read: 3 of 12, and prepare.max_broken is 2: flower/000",
    ):
        run_prepare(broken, str(tmp_path / "new"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_storage_that_stays_away_leaves_nothing_out_and_the_command_can_be_repeated(
    config, cache, tmp_path, monkeypatch, number
):
    read_bytes = pathlib.Path.read_bytes

    def fail(path):
        if path.name == "005.jpg":
            raise OSError(number, os.strerror(number))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(records, "WAITS", (0,))
        patch.setattr(pathlib.Path, "read_bytes", fail)
        with pytest.raises(
            DataError,
            match=f"flower/005.jpg cannot be read .{os.strerror(number)}., after 2 attempts",
        ):
            run_prepare(config, str(tmp_path / "new"))
    assert len(list((tmp_path / "new" / "shards").glob("*.json"))) == 1, "the shard before it"
    assert run_prepare(config, str(tmp_path / "new")).count == COUNT
    assert files_of(tmp_path / "new") == files_of(cache)


# going on


def test_images_may_lie_elsewhere_the_next_time(config, cache, tmp_path, monkeypatch):
    for path in (cache / "shards").glob("00001*"):
        path.unlink()
    moved = pathlib.Path(config.prepare.path).rename(tmp_path / "mounted elsewhere")
    config.prepare.path, lines = str(moved), []
    assert run_prepare(config, str(cache), say=lines.append).count == COUNT
    assert lines[0] == "2 of 3 shards are finished already"


def test_cache_of_a_version_that_told_sources_by_their_path_goes_on(config, cache, tmp_path):
    plan = json.loads((cache / "plan.json").read_text())
    plan |= {"path": config.prepare.path}
    del plan["contents"]
    (cache / "plan.json").write_text(json.dumps(plan))
    assert run_prepare(config, str(cache)).count == COUNT
    plan["path"] = "elsewhere"
    (cache / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(DataError, match="holds a latent cache of something else"):
        run_prepare(config, str(cache))


def test_second_run_makes_nothing_anew(config, cache, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (cache / "shards").iterdir()}
    files, lines = files_of(cache), []
    monkeypatch.setattr(
        Autoencoder, "encode", lambda self, images: pytest.fail("nothing is encoded")
    )
    run_prepare(config, str(cache), say=lines.append)
    assert {path: path.stat().st_mtime_ns for path in (cache / "shards").iterdir()} == before
    assert (
        files_of(cache) == files
        and lines[0] == "3 of 3 shards are finished already"
        and len(lines) == 2
    )


def shorten(path):
    path.write_bytes(path.read_bytes()[:-5])


def spoil(path):
    whole = path.read_bytes()
    changed = (
        whole.replace(b'"count": 5', b'"count": 6')
        if path.suffix == ".json"
        else whole[:3000] + b"?" + whole[3001:]
    )
    assert changed != whole
    path.write_bytes(changed)


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, shorten, spoil])
@pytest.mark.parametrize(
    "name", ["00001-of-00003.array_record", "00001-of-00003.array_record.json"]
)
def test_only_what_is_missing_or_damaged_is_made_anew(config, cache, name, damage):
    files = files_of(cache)
    path = cache / "shards" / name
    damage(path)
    others = {
        other: other.stat().st_mtime_ns
        for other in (cache / "shards").iterdir()
        if not other.name.startswith("00001")
    }
    run_prepare(config, str(cache))
    assert (
        files_of(cache) == files and {other: other.stat().st_mtime_ns for other in others} == others
    )


def test_leftovers_of_another_run_do_no_harm(config, cache, tmp_path):
    files = files_of(cache)
    (tmp_path / "new" / "shards").mkdir(parents=True)
    for name in (
        "00000-of-00003.array_record",
        "00001-of-00003.array_record.unfinished",
        "00001-of-00003.array_record.json.tmp",
    ):
        (tmp_path / "new" / "shards" / name).write_bytes(b"left over")
    run_prepare(config, str(tmp_path / "new"))
    assert files_of(tmp_path / "new") == files
