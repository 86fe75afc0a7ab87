"""What goes on where it was stopped: the last checkpoint of a piece of work."""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """The last checkpoint of some work, in a folder of its own; or nothing at all."""

    def __init__(self, manager: ocp.CheckpointManager | None):
        self._manager = manager

    def save(self, step: int, tree: Any) -> None:
        """Write the arrays of a tree after so many steps, in place of the last."""
        if self._manager:
            leaves = jax.tree.leaves(tree)
            self._manager.save(step, args=ocp.args.StandardSave(leaves))

    def restored(
        self, tree: Any, form: Callable[[list[Any]], Any] | None = None
    ) -> tuple[int, Any]:
        """Return after how many steps the last was written, and the tree as it was.

        Where there is none, zero and the tree that is given, else one like it; with
        `form` one like what it makes of the arrays that were written, for trees whose
        shapes change.
        """
        step = self._manager.latest_step() if self._manager else None
        if step is None:
            return 0, tree
        if form is not None:
            tree = form(self._manager.restore(step, args=ocp.args.StandardRestore()))
        leaves, structure = jax.tree.flatten(tree)
        found = self._manager.restore(step, args=ocp.args.StandardRestore(leaves))
        found = [
            np.array(new) if isinstance(old, np.ndarray) else new
            for old, new in zip(leaves, found, strict=True)
        ]
        return step, jax.tree.unflatten(structure, found)


@contextlib.contextmanager
def checkpoints(
    identity: Any, folder: Path | None, *, keep: bool = False
) -> Iterator[Checkpoints]:
    """Give the checkpoints of some work, which are deleted once it is finished.

    Args:
      identity: what tells it from other work, of which JSON can be made.
      folder: of the checkpoints of all; without, none are written.
      keep: whether they are kept instead, for work that may be continued.
    """
    if folder is None:
        yield Checkpoints(None)
        return
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    own = folder.absolute() / name
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(own, options=options) as manager:
        yield Checkpoints(manager)
    if not keep:
        shutil.rmtree(own, ignore_errors=True)


# ------------------------------------------------- those of a training that takes days


class Training:
    """The last few checkpoints of one training, and the best one; written behind it.

    A folder under way when the program is killed is not taken for a checkpoint. What is
    restored lies as it is asked for, whatever the mesh it was saved from.

    Args:
      folder: of the checkpoints, shared by all hosts: `last` and `best` are in it.
      identity: what tells the training from others, of which JSON can be made.
      keep: how many of the last ones to keep.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int):
        self._folder, self._identity = folder.absolute(), dict(identity)
        self._last, self._best = (
            ocp.CheckpointManager(
                self._folder / name,
                options=ocp.CheckpointManagerOptions(max_to_keep=count),
            )
            for name, count in (("last", keep), ("best", 1))
        )

    def save(self, step: int, tree: Any) -> None:
        """Begin to write a checkpoint, once the one before is written."""
        self._write(self._last, step, tree, {})

    def save_if_best(self, step: int, tree: Any, merit: float) -> None:
        """Begin to write a checkpoint, if there is none of a higher merit."""
        best = self._best.latest_step()
        # Where it is not older, an earlier run was killed behind it.
        if math.isfinite(merit) and (
            best is None
            or (step > best and merit > self._describe(self._best)["merit"])
        ):
            self._write(self._best, step, tree, {"merit": merit})

    def restored(self, like: Any, *, best: bool = False) -> tuple[int, Any] | None:
        """Return the step of the last (or best) checkpoint and its tree; or None.

        Args:
          like: arrays, or their shapes with the shardings that they shall have.
          best: which.

        Raises:
          ValueError: if it is of another training; says what differs.
        """
        manager = self._best if best else self._last
        step = manager.latest_step()
        if step is None:
            return None
        self._compare(self._describe(manager)["identity"])
        leaves, structure = jax.tree.flatten(like)
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(leaves))
        found = manager.restore(step, args=wanted)["state"]
        return step, jax.tree.unflatten(structure, found)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until all is written."""
        for manager in (self._last, self._best):
            manager.wait_until_finished()
            manager.close()

    def _write(
        self,
        manager: ocp.CheckpointManager,
        step: int,
        tree: Any,
        more: Mapping[str, Any],
    ) -> None:
        # Several processes meet under one name while one writes: never both at once.
        for other in (self._last, self._best):
            other.wait_until_finished()
        about = {"identity": self._identity, **more}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.leaves(tree)),
            about=ocp.args.JsonSave(about),
        )
        manager.save(step, args=items)

    def _describe(self, manager: ocp.CheckpointManager) -> dict[str, Any]:
        manager.wait_until_finished()
        wanted = ocp.args.Composite(about=ocp.args.JsonRestore())
        return manager.restore(manager.latest_step(), args=wanted)["about"]

    def _compare(self, found: Mapping[str, Any]) -> None:
        """Raise unless a checkpoint is of this training."""
        ours = json.loads(json.dumps(self._identity))
        differ = [
            name for name in {**ours, **found} if ours.get(name) != found.get(name)
        ]
        if differ:
            what = "; ".join(
                f"`{name}` is {ours.get(name)!r} here and {found.get(name)!r} there"
                for name in differ
            )
            raise ValueError(
                f"The checkpoint in {self._folder} is of another training: {what}. "
                "Go on with the settings of that, or write to another folder."
            )
