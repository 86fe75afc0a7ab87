"""CIFAR-10: prepared from an archive without TensorFlow, read back, divided."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")

from tensorflow_datasets.image_classification import cifar

from examples import prepare_cifar10
from examples.data import cifar10, load_cifar10

PER_BATCH = 20
NAMES = ["airplane", "automobile", "bird", "cat", "deer"]
NAMES += ["dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_archive(path, seed=0, batches=BATCHES):
    """Write an archive laid out as the official one; return its images and labels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (len(BATCHES) * PER_BATCH, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, len(images))
    files = {"batches.meta.txt": "\n".join([*NAMES, ""]).encode()}
    for i, name in enumerate(batches):
        rows = range(i * PER_BATCH, (i + 1) * PER_BATCH)
        planes = [
            images[j, :, :, colour].tobytes() for j in rows for colour in range(3)
        ]
        pixels = [b"".join(planes[3 * j : 3 * j + 3]) for j in range(PER_BATCH)]
        records = [bytes([labels[j]]) + p for j, p in zip(rows, pixels, strict=True)]
        files[f"{name}.bin"] = b"".join(records)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return images, labels


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the folder, the images and the labels of a small prepared set."""
    folder = tmp_path_factory.mktemp("cifar10")
    archive = folder / "archive.tar.gz"
    images, labels = make_archive(archive)
    prepare_cifar10.prepare(archive, folder, sha256(archive))
    return folder, images, labels


@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def find_rows(images, among):
    """Return where each image stands among others, all of them different."""
    places = {image.tobytes(): i for i, image in enumerate(among)}
    assert len(places) == len(among)
    return [places[image.tobytes()] for image in images]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_what_is_read_is_what_the_archive_holds(small):
    folder, images, labels = small
    data = load_cifar10(folder)
    assert [len(split.labels) for split in data] == [90, 10, 20]
    for split in data:
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        rows = find_rows(split.images, images)
        np.testing.assert_array_equal(split.labels, labels[rows])
    np.testing.assert_array_equal(data.test.images, images[100:])
    assert "tensorflow" not in sys.modules


def test_the_division_is_disjoint_and_always_the_same(small):
    folder, images, _ = small
    np.random.seed(1)
    data = load_cifar10(folder)
    train, validation = (find_rows(part.images, images) for part in data[:2])
    assert sorted(train + validation) == list(range(100))
    # The last tenth of numpy's permutation of seed 0: a new division is a new study.
    assert validation == [87, 36, 21, 83, 9, 96, 67, 64, 47, 44]


def test_arrays_are_cached_and_never_stale(small, tmp_path, monkeypatch):
    decoded = []
    decode = cifar10._decode
    monkeypatch.setattr(
        cifar10, "_decode", lambda *args: decoded.append(args) or decode(*args)
    )
    archive = tmp_path / "archive.tar.gz"
    make_archive(archive, seed=1)
    prepare_cifar10.prepare(archive, tmp_path, sha256(archive))
    first = load_cifar10(tmp_path)
    assert_equal(first, load_cifar10(tmp_path))
    assert len(decoded) == 2  # train and test, once

    (cache,) = (tmp_path / "cifar10").glob("*.npz")
    whole = cache.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for broken in (whole[: len(whole) // 2], flipped, b""):
        decoded.clear()
        cache.write_bytes(broken)
        assert_equal(first, load_cifar10(tmp_path))
        assert_equal(first, load_cifar10(tmp_path))
        assert len(decoded) == 2

    # The cache of another set, whole and of the same shapes.
    load_cifar10(small[0])
    (other,) = (small[0] / "cifar10").glob("*.npz")
    cache.write_bytes(other.read_bytes())
    assert_equal(first, load_cifar10(tmp_path))
    left = {path.name for path in (tmp_path / "cifar10").iterdir()}
    assert left == {"3.0.2", cache.name}


def test_a_folder_that_cannot_be_written_is_read(small, monkeypatch):
    def savez(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    folder, images, _ = small
    for cache in (folder / "cifar10").glob("*.npz"):
        cache.unlink()
    monkeypatch.setattr(np, "savez", savez)
    find_rows(load_cifar10(folder).train.images, images)
    assert [path.name for path in (folder / "cifar10").iterdir()] == ["3.0.2"]


def test_the_folder_is_the_argument_or_the_environments(small, monkeypatch, tmp_path):
    monkeypatch.setenv("ORTHAX_DATA", str(small[0]))
    assert len(load_cifar10().test.labels) == 20
    with pytest.raises(FileNotFoundError):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("left", [None, "cifar10/3.0.2/cifar10-train.array_record"])
def test_missing_data_name_both_ways_to_get_them(tmp_path, left):
    if left is not None:  # a folder copied in half
        (tmp_path / left).parent.mkdir(parents=True)
        (tmp_path / left).write_bytes(b"half")
    with pytest.raises(FileNotFoundError) as raised:
        load_cifar10(tmp_path)
    message = str(raised.value)
    assert str(tmp_path / "cifar10") in message
    assert "python -m examples.prepare_cifar10" in message
    assert "cifar-10-binary.tar.gz" in message
    assert "download_and_prepare()" in message and "TensorFlow" in message
    assert "ORTHAX_DATA" in message


def test_the_checksum_is_the_one_that_tfds_has_registered():
    registered = cifar.Cifar10.url_infos[prepare_cifar10.URL]
    assert registered.checksum == prepare_cifar10.SHA256


def test_a_corrupt_archive_is_refused(tmp_path, capsys):
    archive = tmp_path / "archive.tar.gz"
    make_archive(archive)
    found = sha256(archive)
    message = f"found SHA-256 {found}; expected {prepare_cifar10.SHA256}"
    with pytest.raises(ValueError, match=message):
        prepare_cifar10.prepare(archive, tmp_path, prepare_cifar10.SHA256)
    with pytest.raises(SystemExit, match=message):
        prepare_cifar10.main([str(archive), "--data-dir", str(tmp_path)])
    assert not (tmp_path / "cifar10").exists()


def test_what_a_killed_run_leaves_is_no_data_set(tmp_path):
    archive = tmp_path / "archive.tar.gz"
    images, _ = make_archive(archive)
    script = """
import os, sys
from pathlib import Path
from examples import prepare_cifar10

class Killed:
    def fromarray(pixels, images=[]):
        images.append(pixels)
        if len(images) == 110:  # the training images are written
            os._exit(9)
        return image.fromarray(pixels)

image, prepare_cifar10.Image = prepare_cifar10.Image, Killed
prepare_cifar10.prepare(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""
    command = [sys.executable, "-c", script, archive, tmp_path, sha256(archive)]
    root = Path(prepare_cifar10.__file__).parents[1]
    killed = subprocess.run(command, cwd=root, capture_output=True, timeout=100)
    assert killed.returncode == 9, killed.stderr
    assert len(list((tmp_path / "cifar10").iterdir())) == 1  # something is left
    with pytest.raises(FileNotFoundError):
        load_cifar10(tmp_path)
    prepare_cifar10.prepare(archive, tmp_path, sha256(archive))
    find_rows(load_cifar10(tmp_path).train.images, images)


def test_half_a_folder_is_not_taken_for_a_prepared_one(tmp_path):
    archive = tmp_path / "archive.tar.gz"
    make_archive(archive)
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"holds no whole data set.* delete it"):
        prepare_cifar10.prepare(archive, tmp_path, sha256(archive))


def test_the_command_downloads_checks_and_prepares_once(
    tmp_path, monkeypatch, capsys, no_network
):
    archive = tmp_path / "official.tar.gz"
    _, labels = make_archive(archive)
    arguments = ["--data-dir", str(tmp_path / "data")]
    with pytest.raises(SystemExit, match=r"cannot be downloaded \(no network\)"):
        prepare_cifar10.main(arguments)

    monkeypatch.undo()
    monkeypatch.setattr(prepare_cifar10, "URL", archive.as_uri())
    with pytest.raises(SystemExit, match="found SHA-256"):
        prepare_cifar10.main(arguments)
    assert not list((tmp_path / "data" / "downloads").iterdir())

    monkeypatch.setattr(prepare_cifar10, "SHA256", sha256(archive))
    prepare_cifar10.main(arguments)
    data = load_cifar10(tmp_path / "data")
    np.testing.assert_array_equal(data.test.labels, labels[100:])

    archive.unlink()  # nothing to download, and no need
    prepare_cifar10.main(arguments)
    assert capsys.readouterr().out.splitlines()[-1].endswith("already prepared")


def test_a_missing_archive_ends_with_a_message(tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        prepare_cifar10.main([str(tmp_path / "nowhere"), "--data-dir", str(tmp_path)])


@pytest.mark.skipif("ORTHAX_DATA" not in os.environ, reason="needs ORTHAX_DATA")
def test_the_real_images():
    data = load_cifar10()
    assert [len(split.labels) for split in data] == [45_000, 5_000, 10_000]
    images = np.concatenate([data.train.images, data.validation.images])
    labels = np.concatenate([data.train.labels, data.validation.labels])
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 5000))
    np.testing.assert_array_equal(np.bincount(data.test.labels), np.full(10, 1000))
    # As published with countless training scripts.
    means = images.mean((0, 1, 2), np.float64) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], rtol=0, atol=1e-4)
