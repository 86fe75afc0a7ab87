"""What goes on where it was stopped: the last checkpoint of a piece of work."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
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

    def restored(self, tree: Any) -> tuple[int, Any]:
        """Return after how many steps the last was written, and the tree as it was.

        Where there is none, zero and the tree that is given, else one like it.
        """
        step = self._manager.latest_step() if self._manager else None
        if step is None:
            return 0, tree
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
