"""CIFAR-10, from the array_record files of TensorFlow Datasets; no TensorFlow.

Krizhevsky: "Learning multiple layers of features from tiny images", 2009.
"""

import contextlib
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from examples.data.dataset import Dataset, Split

_MISSING = """\
There is no prepared CIFAR-10 in {folder}. Two ways to get it:
  python -m examples.prepare_cifar10 --data-dir "{root}"
downloads the official archive (where there is no network give the path of
cifar-10-binary.tar.gz before --data-dir) and needs no TensorFlow; TFDS itself,
  tfds.builder("cifar10", data_dir="{root}", file_format="array_record")\
.download_and_prepare()
cannot prepare it unless TensorFlow is installed (true of its version 4.9.10).
If it is in another folder, set the environment variable ORTHAX_DATA to that."""


def load_cifar10(data_dir: str | os.PathLike | None = None) -> Dataset:
    """Return CIFAR-10: 45,000 images to train on, 5,000 to validate, 10,000 to test.

    Images are uint8, 32x32 pixels of three colours; ten classes. The images of the test
    are the official ones. The others are divided at random, the last tenth for
    validation, as in arXiv 2202.07052: not by class, so their classes are not exactly
    in proportion. There the division was another in every run; here it is the same
    whatever the run's seed, and does not depend on the order of the files.

    The first call decodes 60,000 PNG images, 12 seconds on one core, and leaves the
    arrays beside the prepared set: 184 MB, which the next call reads in one second if
    they are whole and of that set. In a folder that cannot be written every call
    decodes.

    Args:
      data_dir: folder of prepared data sets, as TFDS has it; by default that of the
        environment variable ORTHAX_DATA, or else TFDS's own.

    Raises:
      FileNotFoundError: if the folder has no prepared CIFAR-10; says how to prepare it.
      NotImplementedError: from TFDS, if it was prepared in another format than
        array_record.
    """
    builder = make_builder(data_dir)
    folder = Path(builder.data_path)
    if not is_prepared(folder):
        root = Path(builder.data_dir_root)
        raise FileNotFoundError(_MISSING.format(folder=folder, root=root))

    checksum = _checksum(folder)
    cache = folder.with_name(f"decoded-{folder.name}.npz")
    parts = _read_cache(cache, checksum, builder.info.splits)
    if parts is None:
        parts = {name: _decode(builder, name) for name in ("train", "test")}
        with contextlib.suppress(OSError):  # read-only, or full
            _write_cache(cache, checksum, parts)
    train, validation = _divide(parts["train"])
    return Dataset(train, validation, parts["test"])


def make_builder(data_dir: str | os.PathLike | None = None) -> Any:
    """Return TFDS's builder of CIFAR-10 for a folder; see `load_cifar10`."""
    try:  # here, because loading the digits needs none
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise SystemExit(f'{error}: pip install -e ".[cifar10]"') from None

    return tfds.builder("cifar10", data_dir=data_dir or os.environ.get("ORTHAX_DATA"))


def is_prepared(folder: Path) -> bool:
    """Return whether the folder of a version holds a whole set, as TFDS marks it.

    TFDS prepares in a folder of another name and renames it at the end; its file of
    information tells such a folder from one that was copied in half.
    """
    return (folder / "dataset_info.json").is_file()


def _divide(whole: Split) -> tuple[Split, Split]:
    """Return nine tenths and one tenth of the images, drawn at random."""
    # The numbers of RandomState never change, those of a Generator may (NEP 19).
    order = np.random.RandomState(0).permutation(len(whole.labels))
    rows = np.split(order, [len(order) - len(order) // 10])
    return tuple(Split(whole.images[i], whole.labels[i]) for i in rows)


def _decode(builder: Any, name: str) -> Split:
    """Return a part in the order of the official archive, which the ids tell."""
    source = builder.as_data_source(split=name)
    progress = tqdm(source, f"decoding CIFAR-10, {name}", unit="image", mininterval=1)
    examples = sorted(progress, key=lambda example: example["id"])
    return Split(
        np.stack([example["image"] for example in examples]),
        np.array([example["label"] for example in examples], np.int32),
    )


def _checksum(folder: Path) -> str:
    """Return the SHA-256 of the record files and their names."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*array_record*")):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {content}\n".encode())
    return whole.hexdigest()


def _read_cache(path: Path, checksum: str, splits: Any) -> dict[str, Split] | None:
    """Return the decoded parts, or None if the file is not whole or of another set."""
    unreadable = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile)
    try:
        # Numpy checks the CRC of every array, but leaves open what is no zip file.
        with path.open("rb") as file, np.load(file) as arrays:
            if arrays["checksum"].item() != checksum:
                return None
            parts = {
                name: Split(arrays[f"{name}_images"], arrays[f"{name}_labels"])
                for name in ("train", "test")
            }
    except unreadable:
        return None
    for name, (images, labels) in parts.items():
        n = splits[name].num_examples
        found = (images.shape, images.dtype, labels.shape, labels.dtype)
        if found != ((n, 32, 32, 3), np.uint8, (n,), np.int32):
            return None
    return parts


def _write_cache(path: Path, checksum: str, parts: dict[str, Split]) -> None:
    arrays = {"checksum": np.array(checksum)}
    for name, (images, labels) in parts.items():
        arrays |= {f"{name}_images": images, f"{name}_labels": labels}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        unfinished.replace(path)  # atomic: no reader ever sees half a file
    finally:
        unfinished.unlink(missing_ok=True)
