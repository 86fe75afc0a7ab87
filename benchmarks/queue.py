"""All that is missing for this device, the most wanted first, within a time limit.

    python -m benchmarks.queue --out DIR --limit-seconds 540

Every script runs in one worker process and writes its rows as they finish; at the limit
the worker is ended. The next call with the same folder goes on where this one stopped.
One folder for each device; `python -m benchmarks.report --merge DIR` puts its rows into
the results.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from benchmarks import (
    peers,
    polar,
    progress,
    speed,
    step,
    tables,
    training,
    trees,
    updates,
)

LOG = "queue.csv"
_STARTED, _DONE, _FAILED, _CUT = "started", "done", "failed", "cut off"


class Job(NamedTuple):
    """The arguments of a script, which measures what is missing."""

    script: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        """Return the job as a command line shows it."""
        return " ".join((self.script, *self.arguments))


# ---------------------------------------------------------------------- what is wanted

# Those of which the targets speak.
_WANTED = ("resnet20", "resnet18", "resnet50", "gpt2_small", "vit_ti16")
# Many decompositions in one program take minutes to compile for a GPU.
_DECOMPOSING = {
    "orthogonalise(SVD())",
    "orthogonalise(GramEigh())",
    peers.SVD_PER_LEAF,
    peers.SVD_STACKED,
    peers.QDWH_PER_LEAF,
}
_PRODUCTS = [name for name in updates.ENTRIES if name not in _DECOMPOSING]
_HALF = ('Auto("fast")', 'NewtonSchulz(dtype="bfloat16")')
_ANCHORS = ("identity", updates.OURS, updates.FAST, peers.OPTAX)


def _step(tree: str, kind: str, methods: Sequence[str] = ()) -> Job:
    chosen = ("--methods", *methods) if methods else ()
    return Job("step", ("--trees", tree, "--gradients", kind, *chosen))


def jobs(platform: str) -> list[Job]:
    """Return the jobs for a platform, the most wanted first."""
    others = [tree for tree in trees.NETWORKS if tree not in _WANTED]
    networks = training.CPU_NETWORKS if platform == "cpu" else tuple(training.CASES)
    trainings = [Job("training", ("--networks", network)) for network in networks]
    everything = [
        _step(tree, kind)
        for kind, names in (("gaussian", others), ("decaying", trees.NETWORKS))
        for tree in names
    ]
    if platform == "cpu":
        wanted = [_step(tree, "gaussian") for tree in _WANTED]
        return [*wanted, Job("polar", ()), Job("speed", ()), *trainings, *everything]
    first = [job for job in trainings if job.arguments[-1] == "resnet20"]
    return [
        *first,
        *(_step(tree, "gaussian", _PRODUCTS) for tree in _WANTED),
        Job("speed", ("--large", "--dtypes", "bfloat16", "--methods", *_HALF)),
        Job("polar", ()),
        *(
            _step(tree, "gaussian", (*_ANCHORS, peers.SVD_PER_LEAF, peers.SVD_STACKED))
            for tree in _WANTED
        ),
        Job("speed", ("--large",)),
        Job("speed", ()),
        *(job for job in trainings if job not in first),
        *(_step(tree, "gaussian", _PRODUCTS) for tree in others),
        *(_step(tree, "decaying", _PRODUCTS) for tree in trees.NETWORKS),
    ]


# ------------------------------------------------------------------ what is done of it


def run(job: Job, out: pathlib.Path) -> None:
    """Measure what a job lacks."""
    paths = ("--results", str(out))
    if job.script == "training" and not _training_is_missing(job, out):
        return
    if job.script == "polar":
        methods = _polar_methods_missing(out)
        if methods:
            polar.main(("--methods", *methods, *paths))
        return
    modules = {"step": step, "speed": speed, "training": training}
    modules[job.script].main((*job.arguments, *paths))


def _training_is_missing(job: Job, out: pathlib.Path) -> bool:
    on_cpu = jax.default_backend() == "cpu"
    batch = training.CPU_BATCH if on_cpu else None
    row = training.setting(job.arguments[-1], batch)._asdict() | tables.circumstances()
    wanted = {
        tables.identity(row | {"optimiser": name}, training.KEY)
        for name in training.OPTIMISERS
    }
    return not wanted <= tables.finished(out / "training.csv", training.KEY)


def _polar_methods_missing(out: pathlib.Path) -> list[str]:
    there, around = (
        tables.finished(out / "polar.csv", polar.KEY),
        tables.circumstances(),
    )

    def rows(method: str) -> Iterator[tables.Row]:
        for case in polar.CASES:
            for dtype in polar.DTYPES:
                yield {"method": method, "case": case, "dtype": dtype} | around

    return [
        method
        for method in polar.METHODS
        if not all(tables.identity(row, polar.KEY) in there for row in rows(method))
    ]


def _note(out: pathlib.Path, job: str, state: str, seconds: float) -> None:
    row = {"job": job, "state": state, "seconds": round(seconds, 1)}
    tables.write(out / LOG, [row], ("job",))


def _states(out: pathlib.Path) -> dict[str, str]:
    return {row["job"]: row["state"] for row in tables.read(out / LOG)}


def hopeless(out: pathlib.Path, limit: float) -> set[str]:
    """Return the jobs that failed, or were cut off with as much time as now."""
    return {
        row["job"]
        for row in tables.read(out / LOG)
        if row["state"] == _FAILED
        or (row["state"] == _CUT and float(row["seconds"]) > 0.9 * limit)
    }


def work(todo: Sequence[Job], out: pathlib.Path) -> None:
    """Run jobs one after another; one that fails is noted and does not stop others."""
    for job in todo:
        start = time.perf_counter()
        _note(out, str(job), _STARTED, 0)
        progress.say(f"== {job}")
        try:
            run(job, out)
            state = _DONE
        except Exception:
            traceback.print_exc()
            state = _FAILED
        _note(out, str(job), state, time.perf_counter() - start)


# ------------------------------------------------------------------------- supervision


def supervise(worker: Sequence[str], out: pathlib.Path, limit: float) -> bool:
    """Run a worker until it is done or the limit is reached, again if it crashes.

    The job in which it crashed counts as failed.

    Returns:
      Whether the worker came to its end.
    """
    end = time.monotonic() + limit
    while True:
        start = time.monotonic()
        process = subprocess.Popen(worker)
        try:
            code = process.wait(max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            code = None
        unfinished = [job for job, state in _states(out).items() if state == _STARTED]
        spent = time.monotonic() - start
        for job in unfinished:
            _note(out, job, _CUT if code is None else _FAILED, spent)
        if code is None or code == 0:
            return code == 0
        if not unfinished:
            raise RuntimeError(f"The worker ended with {code} before its first job.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="folder of the CSV files")
    add("--limit-seconds", type=float, default=540.0)
    add("--only", default="", help="a regular expression: jobs that it is found in")
    add("--retry", action="store_true", help="also what has failed before")
    add("--list", action="store_true", help="show the jobs, run nothing")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker or args.list:
        states = _states(args.out)
        chosen = [
            j for j in jobs(jax.default_backend()) if re.search(args.only, str(j))
        ]
        if args.list:
            print(
                *(f"{j}: {states.get(str(j), 'not begun')}" for j in chosen), sep="\n"
            )
            return
        skipped = hopeless(args.out, args.limit_seconds)
        work([job for job in chosen if str(job) not in skipped], args.out)
        return
    if args.retry:
        for job in hopeless(args.out, args.limit_seconds):
            _note(args.out, job, _CUT, 0)
    command = [sys.executable, "-m", "benchmarks.queue", "--worker"]
    command += ["--out", str(args.out), "--only", args.only]
    command += ["--limit-seconds", str(args.limit_seconds)]
    if supervise(command, args.out, args.limit_seconds):
        print("Nothing is missing any more.")
    else:
        print("Stopped at the limit: call again to go on.")
    for job in sorted(hopeless(args.out, args.limit_seconds)):
        print(f"Failed, or takes longer than the limit: {job}")


if __name__ == "__main__":
    main()
