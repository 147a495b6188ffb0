"""The loss functions of published code, taken out of a checkout by name and called on our tensors.

Nothing of them is in this package: a function is read from the checkout's last commit, compiled by itself, and given torch
and the few names that it uses. lasgroup/SDPO (arXiv:2601.20802) and siyan-zhao/OPSD (arXiv:2601.18734):

    git clone https://github.com/lasgroup/SDPO && git clone https://github.com/siyan-zhao/OPSD
"""

from __future__ import annotations
import __future__

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from composer_plugins.conformance.references import Reference, Tensors
from composer_plugins.errors import ConfigError


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise ConfigError(f"{checkout} is no git checkout of the reference: {done.stderr.strip()}")
    return done.stdout


def commit_of(checkout: Path) -> str:
    """Return the commit that the functions are read from. Raises `ConfigError` when there is no repository."""
    return _git(checkout, "rev-parse", "HEAD").strip()


def function_of(checkout: Path, file: str, name: str, names: dict[str, Any]) -> Any:
    """Return the function `name` of a file of the checkout's last commit, methods included.

    Args:
        names: what the function uses of its module.

    Raises:
        ConfigError: no such file or function.
    """
    tree = ast.parse(_git(checkout, "show", f"HEAD:{file}"))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    if not found:
        raise ConfigError(f"{checkout} has no function {name} in {file} at {commit_of(checkout)[:12]}.")
    found[0].decorator_list = []
    module = ast.Module([found[0]], type_ignores=[])
    space = {"torch": torch, "F": F, **names}
    exec(compile(module, f"{checkout.name}/{file}", "exec", __future__.annotations.compiler_flag), space)
    return space[name]


def sdpo_references(checkout: Path) -> Iterator[Reference]:
    """lasgroup/SDPO's `compute_self_distillation_loss`, its mask being the hinted tokens."""
    helper = SimpleNamespace(masked_sum=function_of(checkout, "verl/utils/torch_functional.py", "masked_sum", {}))
    core = "verl/trainer/ppo/core_algos.py"
    names = {"agg_loss": function_of(checkout, core, "agg_loss", {"verl_F": helper})}
    loss = function_of(checkout, core, "compute_self_distillation_loss", names)

    def run(alpha=1.0, top_k=None, tail=True, full=True, is_clip=2.0):
        config = SimpleNamespace(
            full_logit_distillation=full, distillation_topk=top_k, distillation_add_tail=tail, alpha=alpha, is_clip=is_clip
        )  # fmt: skip

        def on(problem):
            t = Tensors(problem)
            student, teacher = torch.log_softmax(t.student, -1), torch.log_softmax(t.teacher, -1)
            own, theirs = t.logprobs, t.taught
            extra: dict[str, Any] = {"student_all_log_probs": student, "teacher_all_log_probs": teacher}
            if top_k is not None:
                values, ids = student.topk(top_k, -1)
                extra = {"student_topk_log_probs": values, "teacher_topk_log_probs": teacher.gather(-1, ids)}
            value, _ = loss(own, theirs, t.hinted.float(), config, old_log_probs=t.old, **extra)
            return t.finish(value)

        return on

    who = "lasgroup/SDPO"
    for alpha, case in ((1.0, "sdpo full, T = 1.0"), (0.0, "sdpo full, alpha 0"), (0.5, "sdpo full, alpha 0.5")):
        yield Reference(case, f"{who}: full logits, alpha {alpha:g}", run(alpha))
    yield Reference("sdpo full, off-policy", f"{who}: full logits, is_clip 2", run())
    yield Reference(
        "sdpo full, off-policy", f"{who}: full logits, is_clip off", run(is_clip=None), "no importance weight: `sdpo.is_clip: null`"
    )  # fmt: skip
    yield Reference("sdpo topk, T = 1.0", f"{who}: top 5 and tail", run(top_k=5))
    yield Reference("sdpo topk, tail false", f"{who}: top 5, renormalised", run(top_k=5, tail=False))
    yield Reference(
        "sdpo topk, T = 1.0", f"{who}: top 5, renormalised", run(top_k=5, tail=False), "no tail bucket: `sdpo.tail: false`"
    )  # fmt: skip
    yield Reference("sdpo sampled, T = 1.0", f"{who}: sampled tokens", run(full=False))
    yield Reference("sdpo sampled, off-policy", f"{who}: sampled tokens, is_clip 2", run(full=False))


def opsd_references(checkout: Path) -> Iterator[Reference]:
    """OPSD's `generalized_jsd_loss`, its labels being the hinted tokens."""
    loss = function_of(checkout, "opsd_trainer.py", "generalized_jsd_loss", {})

    def run(beta, temperature=1.0, top_k=None):
        def on(problem):
            t = Tensors(problem)
            undo = problem.temperature  # the function divides by the temperature itself
            labels = torch.where(t.hinted, t.ids, -100)
            value = loss(
                t.student * undo, t.teacher * undo, labels=labels, beta=beta, temperature=temperature, top_k=top_k
            )
            return t.finish(value)

        return on

    for beta, case in ((1, "sdpo full, T = 1.0"), (0, "sdpo full, alpha 0"), (0.5, "sdpo full, alpha 0.5")):
        yield Reference(case, f"OPSD: full vocabulary, beta {beta:g}", run(beta))
    yield Reference("sdpo full, T = 0.7", "OPSD: full vocabulary, beta 1, temperature 0.7", run(1, 0.7))
    yield Reference(
        "sdpo full, T = 0.7", "OPSD: full vocabulary, beta 1, temperature 1.1", run(1, 1.1),
        "a temperature of its own: `sdpo.temperature: 1.1`",
    )  # fmt: skip
    yield Reference(
        "sdpo topk of the teacher, T = 1.1", "OPSD: top 5 of the teacher, beta 0.5, temperature 1.1", run(0.5, 1.1, 5)
    )
    yield Reference(
        "sdpo full, off-policy", "OPSD: full vocabulary, beta 1", run(1), "no importance weight: `sdpo.is_clip: null`"
    )
