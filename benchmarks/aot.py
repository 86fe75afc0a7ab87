"""One whole update, compiled ahead of time for a machine that is not there.

The machine is described to the compiler; what it makes of the program is read from its
own text (`costs.py`).
"""

import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import topologies

import orthax
from benchmarks import costs, layouts, peers, tables, trees
from orthax import components, execution, polar

P = jax.sharding.PartitionSpec
_AXIS = "data"

# An H100 SXM5, as XLA describes one where it runs.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Machine(NamedTuple):
    """Chips that are described to a compiler, and how many of them are used.

    Attributes:
      title: what a table calls it.
      platform: `tpu` or `cuda`.
      topology: its name for a TPU; slices x hosts x devices for GPUs.
      count: chips of it.
    """

    title: str
    platform: str
    topology: str
    count: int

    @property
    def layouts(self) -> tuple[str, ...]:
        """How it is known how leaves are sharded.

        By their types, on explicit axes; from the caller, on automatic ones; or not.
        """
        several = ("explicit", "given", "automatic")
        return ("whole",) if self.count == 1 else several

    def devices(self) -> list[Any]:
        """Return the chips as the compiler describes them."""
        if self.platform == "tpu":
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=self.topology
            )
        else:
            described = topologies.get_topology_desc(
                platform=self.platform,
                topology_name="",
                topology=self.topology,
                target_config=_H100,
            )
        return described.devices[: self.count]


MACHINES = {
    "v5e": Machine("TPU v5e, one chip", "tpu", "v5e:2x2", 1),
    "v6e": Machine("TPU v6e, one chip", "tpu", "v6e:2x2", 1),
    "h100": Machine("H100, one chip", "cuda", "1x1x1", 1),
    "v5e-4": Machine("TPU v5e, 2 x 2 chips", "tpu", "v5e:2x2", 4),
    "h100-8": Machine("H100, eight chips", "cuda", "1x1x8", 8),
    "v5e-16": Machine("TPU v5e, 4 x 4 chips", "tpu", "v5e:4x4", 16),
}


class Case(NamedTuple):
    """What is compiled, by name: the columns that tell a row from others."""

    chip: str
    layout: str
    tree: str
    arm: str


Stacking = execution.Stacking
Arm = Callable[[trees.Network, Stacking], optax.GradientTransformation]
ARMS: dict[str, Arm] = {
    "default": lambda net, s: orthax.orthogonalise(rule=net.rule, stacking=s),
    "fast": lambda net, s: orthax.orthogonalise(
        polar.Auto("fast"), rule=net.rule, stacking=s
    ),
    "muon": lambda net, s: orthax.muon(0.02, rule=net.rule, stacking=s),
    "optax": lambda net, _: peers.optax_muon(net.params, net.rule),
}


def matrices(network: trees.Network) -> trees.Network:
    """Return the leaves of a network that its rule cuts, in their places.

    The others pass through all updates but Muon's, and where nothing is donated each
    costs a copy: a fifth of the cycles of ResNet-20 on a TPU.
    """
    leaves = [
        None if leaf.cut is None else leaf.value
        for leaf in components.resolve(network.params, network.rule)
    ]
    structure = jax.tree.structure(network.params)
    return network._replace(params=jax.tree.unflatten(structure, leaves))


def shape_of(network: trees.Network) -> tables.Row:
    """Return how many leaves are updated, how many matrices, and their bytes."""
    leaves = components.resolve(matrices(network).params, network.rule)
    stacks = [s for leaf in leaves for s in leaf.cut.matrices(leaf.value.shape)]
    return {
        "leaves": len(leaves),
        "matrices": sum(b for b, _, _ in stacks),
        "bytes": sum(x.value.size * x.value.dtype.itemsize for x in leaves),
    }


def shardings(network: trees.Network, mesh: jax.sharding.Mesh) -> Any:
    """Shard the longest axis of every leaf's matrices that divides evenly (FSDP)."""

    def lies(leaf: components.Leaf) -> jax.sharding.NamedSharding:
        cut, shape = leaf.cut.on(leaf.value.ndim), leaf.value.shape
        axes = sorted(cut.rows + cut.columns, key=lambda i: -shape[i])
        able = [i for i in axes if shape[i] % mesh.size == 0] if mesh.size > 1 else []
        spec = P(*[None] * able[0], _AXIS) if able else P()
        return jax.sharding.NamedSharding(mesh, spec)

    leaves = components.resolve(network.params, network.rule)
    return jax.tree.unflatten(jax.tree.structure(network.params), map(lies, leaves))


def traced(case: Case, network: trees.Network) -> jax.stages.Traced:
    """Return an update of a network, traced for a machine.

    Gradients and the optimiser's state go in, updates and the new state come out, and
    every one lies as the gradients do. Nothing is donated.
    """
    machine, network = MACHINES[case.chip], matrices(network)
    kind = layouts.AXES["explicit" if case.layout == "explicit" else "auto"]
    devices = np.array(machine.devices())
    mesh = jax.sharding.Mesh(devices, (_AXIS,), axis_types=(kind,))
    lie = shardings(network, mesh)
    stacking = Stacking(shardings=lie if case.layout == "given" else None)
    transform = ARMS[case.arm](network, stacking)
    state = jax.eval_shape(transform.init, network.params)
    states = beside(state, lie, jax.sharding.NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        update = jax.jit(
            lambda g, s: transform.update(g, s, g), out_shardings=(lie, states)
        )
        return update.trace(_placed(network.params, lie), _placed(state, states))


def beside(state: Any, lie: Any, elsewhere: jax.sharding.Sharding) -> Any:
    """Return shardings of a state: what is kept of a leaf lies where the leaf does."""
    known = dict(jax.tree_util.tree_leaves_with_path(lie))

    def where(path: Any, _: Any) -> jax.sharding.Sharding:
        ends = (path[i:] for i in range(len(path)))
        return next((known[end] for end in ends if end in known), elsewhere)

    return jax.tree_util.tree_map_with_path(where, state)


def _placed(tree: Any, lie: Any) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        lie,
    )


def measured(case: Case, network: trees.Network, limit: float) -> tables.Row:
    """Return what the compiler says about a case.

    The process is ended by SIGALRM, whatever it is doing, where lowering and compiling
    together take longer than `limit` seconds. What the compiler does at its first call
    has been done before.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    machine = MACHINES[case.chip]
    one = jax.sharding.SingleDeviceSharding(machine.devices()[0])
    first = jax.ShapeDtypeStruct((8, 128), np.float32, sharding=one)
    jax.jit(lambda x: x + 1).lower(first).compile()
    program = traced(case, network)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limit)
    clock = [time.perf_counter()]
    lowered = program.lower()
    clock.append(time.perf_counter())
    compiled = lowered.compile()
    clock.append(time.perf_counter())
    signal.setitimer(signal.ITIMER_REAL, 0)
    lower, compile_ = (float(x) for x in np.diff(clock))
    spent = {"lower_s": lower, "compile_s": compile_}
    return shape_of(network) | spent | read(compiled, machine)


def read(compiled: jax.stages.Compiled, machine: Machine) -> tables.Row:
    """Return what a compiled program costs on each chip."""
    gpu = machine.platform == "cuda"
    found = costs.read(compiled.as_text(), costs.H100() if gpu else None)
    memory = compiled.memory_analysis()
    kinds = [f"{n} {kind}" for kind, n in sorted(found.collectives.items())]
    products = [f"{kind} x {n}" for kind, n in sorted(found.products.items())]
    row = {
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": ", ".join(kinds) or "none",
        "products": "; ".join(products) or "none",
        "endless_loops": found.endless,
    }
    if gpu:
        return row | {"kernels": found.kernels, "model_ms": found.seconds * 1e3}
    code = memory.generated_code_size_in_bytes
    return row | {"code_bytes": code, "cycles": found.cycles}
