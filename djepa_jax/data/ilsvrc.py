"""ImageNet (ILSVRC 2012) where it lies: in the training archive that image-net.org hands out, a tar
file of one tar file per class. Nothing is unpacked.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from djepa_jax.data.records import DataError
from djepa_jax.data.webdataset import THREADS, Member, TarRecords, tar_members

TRAIN = "ILSVRC2012_img_train.tar"
MAX_CLASS_BYTES = 2**40


def open_ilsvrc(path: str, where: str) -> TarRecords:
    """The images of the archive, or of the one in a folder; labels count the sorted WordNet ids."""
    file = Path(path)
    file = file / TRAIN if file.is_dir() else file
    if not file.is_file():
        raise DataError(
            f"{where}: there is no {TRAIN}; download it from https://image-net.org/download-images "
            "(an account is needed) and leave it packed."
        )
    archives = sorted(tar_members(str(file), limit=MAX_CLASS_BYTES))
    foreign = [inner.name for inner in archives if not re.fullmatch(r"n\d{8}\.tar", inner.name)]
    if foreign or not archives:
        raise DataError(
            f'"{file}" must hold one tar file per class, such as n01440764.tar, and nothing else, '
            f"not {', '.join(foreign[:1]) or 'nothing'}; name another."
        )
    class_names = tuple(inner.name.removesuffix(".tar") for inner in archives)

    def images_of(label: int) -> list[tuple[Member, int]]:
        members = tar_members(str(file), archives[label])
        names = [f"{class_names[label]}/{member.name}" for member in members]
        return [(m._replace(name=name), label) for m, name in zip(members, names, strict=True)]

    with ThreadPoolExecutor(THREADS) as pool:
        images = [pair for pairs in pool.map(images_of, range(len(archives))) for pair in pairs]
    return TarRecords([str(file)], [images], class_names)
