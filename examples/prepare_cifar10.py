"""Prepare CIFAR-10 for TFDS without TensorFlow: `python -m examples.prepare_cifar10`.

TensorFlow Datasets (4.9.10) reads array_record files without TensorFlow, but does not
write CIFAR-10 without it: its builder reads files, and encodes images, by TensorFlow.
Here the builder reads the official archive by Python's `tarfile` and hands TFDS images
that Pillow encodes. Names, order and pixels are those that TFDS writes itself.
"""

import dataclasses
import hashlib
import os
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tyro
from PIL import Image
from tensorflow_datasets.image_classification import cifar
from tqdm import tqdm

from examples.data.cifar10 import is_prepared, make_builder

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
# As TFDS has it registered for that address.
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

_RECORD = 1 + 3 * 32 * 32  # bytes: a label, then the planes red, green and blue


@dataclasses.dataclass(frozen=True)
class PrepareCifar10:
    """Write CIFAR-10 as `examples.train` reads it (array_record), without TensorFlow.

    Takes 164 MB to download, half a minute, and 144 MB on disk.
    """

    archive: tyro.conf.Positional[Path | None] = None
    """The official cifar-10-binary.tar.gz; downloaded where it is not given."""
    data_dir: Path | None = None
    """Where to; else the environment variable ORTHAX_DATA, else TFDS's own folder."""


class Cifar10(cifar.Cifar10, skip_registration=True):
    """TFDS's builder of CIFAR-10, name and version alike, for an archive at hand.

    Args:
      archive: path of the archive.
      options: arguments of every builder.
    """

    def __init__(self, archive: Path, **options: Any):
        self._archive = archive
        super().__init__(**options)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        info = self._cifar_info
        with tarfile.open(self._archive) as archive:
            files = {
                PurePosixPath(member.name).name: archive.extractfile(member).read()
                for member in archive
                if member.isfile()
            }
        self.info.features["label"].names = files["batches.meta.txt"].decode().split()
        return {
            "train": self._generate_examples("train", map(files.get, info.train_files)),
            "test": self._generate_examples("test", map(files.get, info.test_files)),
        }

    def _generate_examples(
        self, split: str, batches: Iterator[bytes]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, _RECORD)
        for i, record in enumerate(records):
            pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
            # TFDS encodes arrays by TensorFlow, images by Pillow.
            image = Image.fromarray(pixels)
            yield i, {"id": f"{split}_{i:05d}", "image": image, "label": int(record[0])}


def prepare(archive: Path, data_dir: Path, sha256: str) -> Path:
    """Write the data set of an archive in TFDS's format; return its folder.

    TFDS writes in a folder of another name and renames it when all is written: what a
    killed run leaves is not taken for a data set.

    Args:
      archive: path of the archive.
      data_dir: folder of prepared data sets.
      sha256: checksum that the archive must have.

    Raises:
      FileNotFoundError: if there is no such archive.
      FileExistsError: if the folder of the data set exists and is not whole.
      ValueError: if the archive has another checksum.
    """
    check(archive, sha256)
    builder = Cifar10(archive, data_dir=data_dir, file_format="array_record")
    folder = Path(builder.data_path)
    if folder.exists() and not is_prepared(folder):
        raise FileExistsError(
            f"{folder} exists but holds no whole data set (no dataset_info.json): "
            "delete it and start again."
        )
    builder.download_and_prepare()
    return folder


def check(archive: Path, sha256: str) -> None:
    """Raise if an archive is not the one that the checksum tells."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{archive} is corrupt, or another archive than {URL}: found SHA-256 "
            f"{found}; expected {sha256}."
        )


def download(path: Path) -> None:
    """Download the official archive to `path`, which appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            size = int(response.headers.get("Content-Length", 0)) or None
            progress = tqdm.wrapattr(
                response, "read", total=size, desc=f"downloading {path.name}"
            )
            with progress as stream, unfinished.open("wb") as file:
                while block := stream.read(1 << 20):
                    file.write(block)
        check(unfinished, SHA256)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare CIFAR-10 as the command line says."""
    config = tyro.cli(
        PrepareCifar10, prog="python -m examples.prepare_cifar10", args=arguments
    )
    builder = make_builder(config.data_dir)
    folder, root = Path(builder.data_path), Path(builder.data_dir_root)
    if is_prepared(folder):
        print(f"{folder}: already prepared")
        return
    archive = config.archive or root / "downloads" / PurePosixPath(URL).name
    try:
        if config.archive is None and not archive.exists():
            download(archive)
        print(f"{prepare(archive, root, SHA256)}: prepared")
    except urllib.error.URLError as error:
        sys.exit(
            f"{URL} cannot be downloaded ({error.reason}). Fetch it elsewhere and give "
            "its path: python -m examples.prepare_cifar10 cifar-10-binary.tar.gz"
        )
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
