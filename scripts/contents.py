"""Check what an sdist and a wheel contain: `python scripts/contents.py dist`."""

import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
# What a checkout may hold and nobody should get.
UNWANTED = ("__pycache__", "_build", ".ipynb_checkpoints", ".venv", ".git", "runs")
TOP_OF_SDIST = {
    *(".ci", ".github", ".gitignore", "benchmarks", "docs", "examples", "orthax"),
    *("scripts", "tests", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"),
    *("PKG-INFO", "README.md", "pyproject.toml"),
}
LARGEST = 20 * 2**20


def package() -> set[str]:
    """Return the files of the package in this checkout."""
    files = (path for path in (ROOT / "orthax").rglob("*") if path.is_file())
    names = (path.relative_to(ROOT).as_posix() for path in files)
    return {name for name in names if "__pycache__" not in name}


def faults_of_wheel(names: set[str]) -> list[str]:
    """Return what is wrong with the files of a wheel."""
    info = {
        name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")
    }
    faults = [f"wheel: {name} too much" for name in sorted(names - info - package())]
    faults += [f"wheel: {name} missing" for name in sorted(package() - names)]
    if "orthax/py.typed" not in names:
        faults.append("wheel: orthax/py.typed missing")
    if not any(name.endswith("licenses/LICENSE") for name in info):
        faults.append("wheel: the licence is missing")
    return faults


def faults_of_sdist(names: set[str]) -> list[str]:
    """Return what is wrong with the files of an sdist, below its one folder."""
    tops = {PurePosixPath(name).parts[0] for name in names}
    faults = [f"sdist: {top} too much" for top in sorted(tops - TOP_OF_SDIST)]
    faults += [f"sdist: {top} missing" for top in sorted(TOP_OF_SDIST - tops)]
    faults += [f"sdist: {name} missing" for name in sorted(package() - names)]
    faults += [
        f"sdist: {name} too much"
        for name in sorted(names)
        if set(PurePosixPath(name).parts) & set(UNWANTED)
    ]
    return faults


def main(folder: Path) -> int:
    """Print what is wrong; return the exit status."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        faults = faults_of_wheel(set(opened.namelist()))
    with tarfile.open(sdist) as opened:
        names = {member.name.partition("/")[2] for member in opened if member.isfile()}
    faults += faults_of_sdist(names)
    for path in (wheel, sdist):
        size = path.stat().st_size
        print(f"{path.name}: {size / 2**20:.2f} MiB")
        if size > LARGEST:
            faults.append(f"{path.name} is larger than {LARGEST / 2**20:.0f} MiB")
    print(*(faults or ["contents as they should be"]), sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
