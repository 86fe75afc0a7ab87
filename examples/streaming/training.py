"""The loop of trainings that take days: batches, steps, evaluation, checkpoints.

What a step computes is in `examples/streaming/program.py`. Whatever was killed goes on
from its last checkpoint with the next batch, and ends with the same numbers as if it
had not been: the state is in the checkpoint, a batch is a function of the seed and the
number of its step, and what the killed run wrote behind the checkpoint is taken back.
"""

import collections
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from examples.data.imagenet import Batch, UnreadableImageError
from examples.data.records import Records
from examples.streaming.log import Log, means
from examples.streaming.program import Program, State, Sums, Task, make_program, place
from examples.streaming.settings import Streamed
from examples.training.checkpoints import Training


class Data(Protocol):
    """Batches, this process's part of each, as `training_batches` has them."""

    def training(self, first: int) -> Generator[Batch, None, None]:
        """Yield the batches of all epochs, from a number on."""

    def validation(self) -> Iterator[Batch]:
        """Yield the batches to evaluate with, equally many in every process."""

    def name(self, i: int, *, training: bool) -> str:
        """Return what to call a record."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long, and what to write where.

    Attributes:
      rates: the learning rate of every step.
      steps: of an epoch.
      seed: of the weights.
      identity: what tells this training from others; of which JSON can be made.
      output: folder, shared by all hosts.
      merit: of the means of `Task.score`; the best checkpoint is that of the highest.
      checkpoint_steps: between two checkpoints; there is one after every epoch, too.
      keep: how many of the last checkpoints to keep.
      log_steps: between two writings of what the steps said.
      profile_steps: how many to profile, from the tenth of this run on.
    """

    rates: np.ndarray
    steps: int
    seed: int
    identity: dict[str, Any]
    output: Path
    merit: Callable[[Mapping[str, float]], float]
    checkpoint_steps: int = 1000
    keep: int = 3
    log_steps: int = 50
    profile_steps: int = 0

    def ends_epoch(self, number: int) -> bool:
        """Return whether an epoch is complete after so many steps."""
        return number % self.steps == 0

    def is_due(self, number: int) -> bool:
        """Return whether there is a checkpoint after so many steps."""
        return self.ends_epoch(number) or number % self.checkpoint_steps == 0

    def pauses(self, number: int) -> bool:
        """Return whether the host waits for the device after so many steps."""
        return self.is_due(number) or number % self.log_steps == 0


def make_plan(
    config: Streamed,
    records: Records,
    steps: int,
    merit: Callable[[Mapping[str, float]], float],
) -> Plan:
    """Return the plan of the settings, given how many steps make an epoch."""
    return Plan(
        config.rates(steps),
        steps,
        config.seed,
        config.identity(records),
        config.output,
        merit,
        config.checkpoint_steps,
        config.keep,
        config.log_steps,
        config.profile_steps,
    )


class DivergedError(ValueError):
    """What is evaluated is no longer a number."""


def train(
    task: Task,
    data: Data,
    plan: Plan,
    mesh: jax.sharding.Mesh,
    begin: Callable[[State], State] = lambda state: state,
) -> State:
    """Train, from the last checkpoint on if there is one; return the last state.

    Args:
      task: what is learned.
      data: from what.
      plan: for how long.
      mesh: on which devices.
      begin: returns the state to begin with, given the one that the task makes; it is
        not asked where there is a checkpoint.

    Raises:
      ValueError: if the checkpoint is of another training.
      DivergedError: after the epoch in which it did.
      UnreadableImageError: from the data; what was trained is in a checkpoint, unless
        several processes train: one alone cannot write what all have.
    """
    program = make_program(task, mesh)
    folder = plan.output / "checkpoints"
    with Training(folder, plan.identity, plan.keep) as saved:
        found = saved.restored(program.state)
        if found is None:
            found = 0, begin(program.initialise(jax.random.key(plan.seed)))
        number, state = found
        with (
            Log(plan.output, number, len(plan.rates), plan.steps) as log,
            contextlib.closing(data.training(number)) as batches,
        ):

            def end_epoch() -> None:
                scores = evaluate(program, state, data, mesh)
                log.epoch(scores)
                if not all(map(math.isfinite, scores.values())):
                    raise DivergedError(f"Diverged by step {number}: {scores}")
                saved.save_if_best(number, state, plan.merit(scores))

            # The last run may have been killed before it had evaluated.
            if number and plan.ends_epoch(number):
                end_epoch()
            steps = Steps(program, batches, data, plan, mesh, number)
            while number < len(plan.rates):
                try:
                    state, said = steps.next(state)
                except UnreadableImageError:
                    if jax.process_count() == 1:
                        saved.save(number, state)
                    raise
                number += 1
                log.step(number, said)
                if plan.pauses(number):
                    log.write()
                if plan.is_due(number):
                    saved.save(number, state)
                if plan.ends_epoch(number):
                    end_epoch()
    return state


class Said(NamedTuple):
    """What a step says of itself: all but the sums are known on the host."""

    rate: float
    sums: Sums
    seconds: float  # from one step to the next
    waited: float  # of these, for the batch


class Steps:
    """The steps from a number on, with the batches they are for."""

    def __init__(
        self,
        program: Program,
        batches: Iterator[Batch],
        data: Data,
        plan: Plan,
        mesh: jax.sharding.Mesh,
        first: int,
    ):
        self._program, self._batches, self._data = program, batches, data
        self._plan, self._mesh = plan, mesh
        self._first, self._number = first, first
        self._step, self._profiling = None, False
        self._under_way = collections.deque()

    def next(self, state: State) -> tuple[State, Said]:
        """Return the state after the next step, which may still be under way."""
        begun = time.perf_counter()
        local = next(self._batches)
        waited = time.perf_counter() - begun
        tell_unreadable(local, self._data, training=True)
        number, plan = self._number, self._plan
        rate = np.float32(plan.rates[number])
        arguments = state, place(local, self._mesh), rate, np.int32(number)
        if self._step is None:
            self._step = self._program.step.lower(*arguments).compile()
            begun, waited = time.perf_counter(), 0.0  # neither of these is a step's
        state, sums = self._step(*arguments)
        self._number += 1
        self._under_way.append(sums)
        # One may be under way while the next batch is fetched.
        while len(self._under_way) > (0 if plan.pauses(self._number) else 1):
            jax.block_until_ready(self._under_way.popleft())
        self._profile()
        return state, Said(
            float(plan.rates[number]), sums, time.perf_counter() - begun, waited
        )

    def _profile(self) -> None:
        """Start and stop the profiler."""
        plan, done = self._plan, self._number - self._first
        left = len(plan.rates) - self._number
        if self._profiling and (done == 10 + plan.profile_steps or not left):
            jax.block_until_ready(self._under_way)
            jax.profiler.stop_trace()
            self._profiling = False
        if plan.profile_steps and done == 10 and left:
            jax.profiler.start_trace(str(plan.output / "profile"))
            self._profiling = True


def tell_unreadable(batch: Batch, data: Data, *, training: bool) -> None:
    """Name the records of a batch that could not be read, on standard error."""
    for i in batch["unreadable"][batch["unreadable"] >= 0]:
        name = data.name(int(i), training=training)
        tqdm.write(f"{name} is not a whole image; skipped", file=sys.stderr)


def evaluate(
    program: Program, state: State, data: Data, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """Return the means of what is summed over the validation images, and their count.

    Exact for any number of them: sums leave out what fills up the last batch.
    """
    total = collections.Counter()
    for local in data.validation():
        tell_unreadable(local, data, training=False)
        sums = program.score(state, place(local, mesh))
        total.update({name: float(value) for name, value in sums.items()})
    return means(total)
