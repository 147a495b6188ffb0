"""What every node of a Ray cluster has of us, asked in the cluster itself before a run is paid for.

    ray job submit --runtime-env runtime_env.yaml -- python -m composer_verl.nodes
    ray job submit --runtime-env runtime_env.yaml -- python -m composer_verl.nodes && ray job submit ... main_ppo ...

One line a node. Exit code 1 when a node cannot import verl, does not register our names, or has another version than
the node that asks.
"""

from __future__ import annotations

import sys
from typing import Any


def look() -> dict[str, Any]:
    """Return what one process of verl finds on its node; `error` when verl or our registration fails."""
    import importlib.metadata
    import os

    found: dict[str, Any] = {"version": None, "loss_modes": [], "error": ""}
    try:
        import verl  # noqa: F401  loads the plugins, as in every worker
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
        from verl.trainer.ppo.v1 import get_trainer_cls

        found["version"] = importlib.metadata.version("composer-plugins")
        found["loss_modes"] = sorted(name for name in POLICY_LOSS_REGISTRY if name.startswith("composer_"))
        if found["loss_modes"]:
            get_trainer_cls("composer")
    except importlib.metadata.PackageNotFoundError:
        found["error"] = "composer-plugins is not installed"
    except Exception as error:  # whatever it is: the line of this node says it
        found["error"] = f"{type(error).__name__}: {error}"
    if not found["error"] and not found["loss_modes"]:
        policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
        found["error"] = (
            f"installed, but verl did not load it (VERL_USE_EXTERNAL_PLUGINS={policy}; an ERROR of composer_verl in "
            "the worker's log says why)"
        )
    return found


def report(nodes: dict[str, dict[str, Any]], here: str | None) -> tuple[list[str], bool]:
    """Return (one line a node, whether all can run our recipes); `here` is the version of the node that asks."""
    lines, good = [], True
    for address, found in nodes.items():
        problem = found["error"]
        if not problem and found["version"] != here:
            problem = f"version {found['version']}, but the driver has {here}"
        good = good and not problem
        what = problem or f"composer-plugins {found['version']}, {len(found['loss_modes'])} loss modes"
        lines.append(f"{address}: {'NOT READY: ' if problem else ''}{what}")
    return lines, good


def main() -> int:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(log_to_driver=False)
    # By value: a node without the package could not import a function of ours.
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[look.__module__])
    task, pending = ray.remote(num_cpus=0)(look), {}
    for node in ray.nodes():
        if node["Alive"]:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            address = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
            pending[address] = task.options(scheduling_strategy=pinned).remote()
    nodes = {}
    for address, reference in pending.items():
        try:
            nodes[address] = ray.get(reference, timeout=300)
        except Exception as error:  # a runtime env that could not be built there, a dead node
            nodes[address] = {"version": None, "loss_modes": [], "error": f"{type(error).__name__}: {error}"}
    lines, good = report(nodes, look()["version"])
    print("\n".join(lines))
    if not good:
        print("Give every node the same package: docs/how-to/verl-cluster.md", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
