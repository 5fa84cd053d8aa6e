"""The launch script that makes a latent cache of ImageNet; nothing is downloaded."""

import pytest
from launching import Machine, dry_run, installing, one_error, program

SIZES = {"ILSVRC2012_img_train.tar": 147_897_477_120, "ILSVRC2012_img_val.tar": 6_744_924_160}


@pytest.fixture
def imagenet(machine) -> list[str]:
    folders = {name: machine.folder / f"the {name}" for name in ("tars", "data_dir", "cache_dir")}
    folders["tars"].mkdir()
    return [f"--{name}={path}" for name, path in folders.items()]


def archive(machine: Machine, name: str, size: int) -> None:
    with open(machine.folder / "the tars" / name, "wb") as file:
        file.truncate(size)  # takes no space


def test_dry_run_of_imagenet(machine, imagenet):
    commands = dry_run(
        machine,
        "prepare_imagenet.sh",
        *imagenet,
        "--dry_run",
        "--platform=tpu",
        "--config.seed=2",
        "--",
        "--x",
    )
    tars, data, cache = (flag.split("=")[1] for flag in imagenet)
    assert commands == [
        *installing(machine, "jax[tpu]", "[gcs,prepare]"),
        program(machine, "djepa_jax.data.ilsvrc", f"--tars={tars}", f"--data_dir={data}"),
        program(
            machine,
            "djepa_jax.main",
            "--mode=prepare",
            "--config=configs/djepa_l.py",
            f"--workdir={cache}",
            "--config.prepare.source=tfds",
            f"--config.prepare.path=imagenet2012@{data}",
            "--config.seed=2",
            "--x",
        ),
    ]


def test_cache_is_published_with_its_metadata_last(machine, imagenet):
    cache = imagenet[2].split("=")[1]
    commands = dry_run(
        machine, "prepare_imagenet.sh", *imagenet, "--publish=gs://b/cache/", "--dry_run"
    )
    assert commands[-3][3:5] == ["--mode=prepare", "--config=configs/djepa_l.py"]
    exclude = "--exclude=^metadata\\.json$|^\\.lock"
    assert commands[-2:] == [
        ["gcloud", "storage", "rsync", "--recursive", exclude, cache, "gs://b/cache"],
        ["gcloud", "storage", "cp", f"{cache}/metadata.json", "gs://b/cache/metadata.json"],
    ]


@pytest.mark.parametrize(("program", "status"), [("exit 0", 0), ("exit 3", 3)])
def test_only_a_finished_cache_is_published(machine, imagenet, program, status):
    for name in SIZES:
        archive(machine, name, 1)
    machine.install("gcloud", '#!/usr/bin/env bash\necho "gcloud ${*:1:2}" >>"$LOG"\n')
    flags = [*imagenet, "--skip_size_check", "--publish=gs://b/cache"]
    done = machine.launch("prepare_imagenet.sh", *flags, PROGRAM=program)
    published = [line for line in machine.log() if line.startswith("gcloud")]
    assert done.returncode == status, done.stderr
    assert published == ([] if status else ["gcloud storage rsync", "gcloud storage cp"])


def test_imagenet_archives_are_checked(machine, imagenet):
    one_error(
        machine.launch("prepare_imagenet.sh", *imagenet),
        *SIZES,
        "not in",
        "image-net.org",
        "registration",
    )
    archive(machine, "ILSVRC2012_img_train.tar", SIZES["ILSVRC2012_img_train.tar"])
    done = machine.launch("prepare_imagenet.sh", *imagenet)
    one_error(done, "ILSVRC2012_img_val.tar")
    assert "train" not in done.stderr
    archive(machine, "ILSVRC2012_img_val.tar", 10)
    one_error(
        machine.launch("prepare_imagenet.sh", *imagenet),
        "has 10 bytes and not 6744924160",
        "--skip_size_check",
    )
    assert machine.log() == [] and not (machine.checkout / ".venv").exists()


@pytest.mark.parametrize("size", [None, 10])
def test_imagenet_is_prepared_in_two_steps(machine, imagenet, size):
    for name, full in SIZES.items():
        archive(machine, name, size or full)
    flags = imagenet if size is None else [*imagenet, "--skip_size_check"]
    done = machine.launch("prepare_imagenet.sh", *flags, "--config.seed=2", PROGRAM="exit 4")
    assert done.returncode == 4, done.stderr
    tars, data, cache = imagenet
    workdir = cache.replace("cache_dir=", "workdir=", 1)
    assert machine.log()[3:] == [
        f"-m djepa_jax.data.ilsvrc {tars} {data}",
        f"-m djepa_jax.main --mode=prepare --config=configs/djepa_l.py {workdir} "
        "--config.prepare.source=tfds "
        f"--config.prepare.path=imagenet2012@{data.split('=', 1)[1]} --config.seed=2",
    ]
    done = machine.launch("prepare_imagenet.sh", *flags, IMAGENET_STATUS="3")
    assert done.returncode == 3 and len(machine.log()) == 1
