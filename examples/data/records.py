"""Encoded images with labels, from a tree of folders or from TFDS; no TensorFlow.

They are decoded by who reads them, so that what is damaged can be named.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Records(Protocol):
    """Encoded images with labels, read in any order, by any process."""

    classes: int

    def __len__(self) -> int:
        """Return how many there are."""

    def read(self, i: int) -> tuple[bytes, int]:
        """Return an encoded image and its label."""

    def name(self, i: int) -> str:
        """Return what to call it in a message."""


class ImageFolder:
    """The files of `folder/<class>/`, numbered in the order of their names.

    Every file that is not hidden is a record, whatever it is called.

    Args:
      folder: of the folders of the classes.
      names: of the classes that it must have, in the order of their labels; by default
        those that it has.

    Raises:
      ValueError: if a class has no images, or the classes are others.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None):
        found = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        )
        self.names = list(names or found)
        if not found or found != sorted(self.names):
            odd = sorted(set(found) ^ set(self.names))
            what = f"other classes than in training: {', '.join(odd[:5])}"
            raise ValueError(f"{folder} has {what if odd else 'no folders of classes'}")
        files, counts = [], []
        for name in self.names:
            own = [
                f"{name}/{entry.name}"
                for entry in os.scandir(folder / name)
                if entry.is_file() and not entry.name.startswith(".")
            ]
            if not own:
                raise ValueError(
                    f"{folder / name} has no images; expected one or more in the "
                    "folder of every class: add some, or remove the folder"
                )
            files += sorted(own)
            counts.append(len(own))
        self.folder, self.classes = folder, len(self.names)
        # A million strings are slow to send to a worker; one array is not.
        self._files = np.array([os.fsencode(file) for file in files])
        self._labels = np.repeat(np.arange(self.classes, dtype=np.int32), counts)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._files)

    def read(self, i: int) -> tuple[bytes, int]:
        """Return the content of a file and its label."""
        return Path(self.name(i)).read_bytes(), int(self._labels[i])

    def name(self, i: int) -> str:
        """Return the path of a file."""
        return os.path.join(self.folder, os.fsdecode(self._files[i]))


class TfdsRecords:
    """A split of a prepared data set of TFDS, as array_record, its images encoded."""

    def __init__(self, builder: Any, split: str):
        import tensorflow_datasets as tfds  # here: a tree of folders needs none

        features = builder.info.features
        self.classes = features["label"].num_classes
        self._name = f"{builder.info.full_name}, {split}"
        keep = {"image": tfds.decode.SkipDecoding()}
        self._source = builder.as_data_source(split, decoders=keep)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._source)

    def read(self, i: int) -> tuple[bytes, int]:
        """Return an encoded image and its label."""
        example = self._source[i]
        return example["image"], int(example["label"])

    def name(self, i: int) -> str:
        """Return the set, the split and the number of an example."""
        return f"{self._name}, example {i}"


_MISSING = """\
There are no images in {folder}. Expected either a tree of folders,
  {folder}/train/<class>/*.JPEG and {folder}/val/<class>/*.JPEG,
or ImageNet as TFDS prepares it from the archives of image-net.org (once, on a machine \
with TensorFlow, which reading it does not need):
  tfds.builder("imagenet2012", data_dir="{folder}", file_format="array_record")\
.download_and_prepare()
If it is elsewhere say `--data-dir`, or set the environment variable ORTHAX_DATA."""


def load_imagenet(data_dir: str | os.PathLike | None = None) -> tuple[Records, Records]:
    """Return the records to train on, and those of the validation split.

    Args:
      data_dir: a folder with the folders `train` and `val` of one folder for every
        class, or one of prepared data sets, as TFDS has it; by default that of the
        environment variable ORTHAX_DATA, or else TFDS's own.

    Raises:
      FileNotFoundError: if the folder has neither; says what is expected.
      ValueError: if the folder of a class is empty, or the parts have other classes.
    """
    given = data_dir or os.environ.get("ORTHAX_DATA")
    folder = Path(given or "~/tensorflow_datasets").expanduser().absolute()
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        train = ImageFolder(folder / "train")
        return train, ImageFolder(folder / "val", train.names)
    if not (folder / "imagenet2012").is_dir():
        raise FileNotFoundError(_MISSING.format(folder=folder))
    import tensorflow_datasets as tfds

    builder = tfds.builder("imagenet2012", data_dir=folder)
    return TfdsRecords(builder, "train"), TfdsRecords(builder, "validation")
