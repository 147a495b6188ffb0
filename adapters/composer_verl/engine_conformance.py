"""The verl adapter under the conformance suite on verl's real training worker and FSDP2 engine, without Ray.

The table goes to the engine as a model on disk; the rollouts as verl's trainer hands them to its workers, with the fields
that our trainer adds (self-teacher's log-probs through `Teacher`, pairs through `lay_out` and `RowMaker`). verl pads the rows,
or packs them (`use_remove_padding`), cuts them, runs the model, calls `composer_loss` and steps the optimizer. It needs a device
that verl has an engine for; on a CPU `tests/verl/cpu_host` registers one (docs/how-to/verl-cpu.md).
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from composer_plugins.conformance.adapter import AdapterConformance
from composer_plugins.conformance.capabilities import Capability as Can
from composer_plugins.conformance.problem import Layout, Outcome, Problem
from composer_plugins.conformance.ranks import Servant, averaged, on_ranks
from composer_plugins.conformance.table_model import know_table_model, read_by_teacher, save_table_model
from composer_verl.engine_worker import Group, build, watch

TABLE, HINTED = "model.table.weight", "model.hinted.weight"
LOGITS = "verl's engines show a loss the chosen token's log-prob, and k entries at level topk: never all logits"
PADS = "verl pads a micro-batch to its longest row itself; packed is compared with that"


class TestVerlEngine(AdapterConformance):
    """verl's training worker with our channels."""

    capabilities: ClassVar[frozenset] = frozenset(
        {
            Can.SAMPLED, Can.TOPK, Can.SEQUENCE_RATIO, Can.OFF_POLICY_SDPO, Can.ACCUMULATION, Can.PACKED, Can.MULTI_RANK,
            Can.PAIRWISE, Can.ADVANTAGE_FORM, Can.FORWARDS, Can.LIVE_TEACHER, Can.EMA_TEACHER, Can.REFERENCE_TEACHER,
            Can.RESUME, Can.BF16, Can.MONITOR,
        }
    )  # fmt: skip
    reasons: ClassVar[dict[Any, str]] = {Can.FULL: LOGITS, Can.PADDED: PADS}
    servant: ClassVar[Servant | None] = None

    @classmethod
    def teardown_class(cls) -> None:
        """End the process that holds verl."""
        if TestVerlEngine.servant is not None:
            TestVerlEngine.servant.close()
            TestVerlEngine.servant = None

    def evaluate(self, problem: Problem, composer: dict[str, Any], layout: Layout) -> Outcome:
        _needs_an_engine()
        if layout.ranks > 1:
            return averaged(on_ranks(_evaluate, layout.ranks, problem, composer, layout))
        return self._process().call(_evaluate, problem, composer, layout)

    def run(
        self, problem: Problem, composer: dict[str, Any], layout: Layout, *, steps: int, learning_rate: float,
        resume_after: int | None = None,
    ) -> list[Outcome]:  # fmt: skip
        _needs_an_engine()
        return self._process().call(_run, problem, composer, layout, steps, learning_rate, resume_after)

    @classmethod
    def _process(cls) -> Servant:
        if TestVerlEngine.servant is None:
            TestVerlEngine.servant = Servant()
            TestVerlEngine.servant.call(_alone)
        return TestVerlEngine.servant


def _needs_an_engine() -> None:
    if not torch.cuda.is_available() and not os.environ.get("VERL_USE_EXTERNAL_MODULES"):
        pytest.skip("not offered: verl has no engine for a CPU; tests/verl/cpu_host adds one (docs/how-to/verl-cpu.md)")


def _alone() -> None:
    """Make this process rank 0 of 1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


def _evaluate(problem: Problem, composer: dict[str, Any], layout: Layout) -> Outcome:
    return _run(problem, composer, layout, 1, 0.0, None)[0]


def _run(
    problem: Problem, composer: dict[str, Any], layout: Layout, steps: int, learning_rate: float, resume_after: int | None
) -> list[Outcome]:  # fmt: skip
    from composer_verl.monitor import StepMonitor

    torch.set_num_threads(1)
    know_table_model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_table_model(problem, folder / "model")
        step = Step(problem, composer, layout, folder / "model", learning_rate)
        monitor, found = StepMonitor(step.section), []
        for number in range(steps):
            if number == resume_after:
                step.worker.save_checkpoint(str(folder / "checkpoint"))
                (folder / "state").mkdir()
                monitor.save(folder / "state")
                step = Step(problem, composer, layout, folder / "model", learning_rate)
                step.worker.load_checkpoint(str(folder / "checkpoint"))
                monitor = StepMonitor(step.section)
                monitor.load(folder / "state")
            found.append(step.take())
            ends = {f"critic/advantages/{end.__name__}": end(r.advantage for r in problem.rows) for end in (max, min)}
            told = {f"actor/{name}": value for name, value in found[-1].metrics.items()}
            monitor.close({"actor/grad_norm": 0.0, **told, **ends}, {})
    return found


class Step:
    """A worker, and what our trainer does around one update of it."""

    def __init__(
        self, problem: Problem, composer: dict[str, Any], layout: Layout, model: Path, learning_rate: float
    ) -> None:
        from composer_verl.channel_loss import composer_loss
        from composer_verl.conformance import configuration

        self.problem, self.layout = problem, layout
        self.section, actor = configuration(composer, pairs=len(problem.pairs))
        kind = self.section.sdpo.teacher.kind if self.section.sdpo.weight > 0 else "live"
        self.with_pairs = self.section.replay_dpo.weight > 0 and len(problem.pairs) > 0
        self.micro = len(layout.micro_batches[0])
        # pairs join the first micro-batch when there is one only
        rows = self.micro + (2 * len(problem.pairs) if self.with_pairs else 0)
        self.rows_per_micro = rows if len(layout.micro_batches) == layout.ranks else self.micro
        options = {"micro": self.rows_per_micro, "packed": layout.packed, "dtype": layout.dtype, "lr": learning_rate}
        self.worker = build(model, strategy="composer_fsdp2" if kind == "ema" else "fsdp2", **options)
        self.initial = build(model, **options) if kind == "reference" else None
        self.losses: list[float] = []
        self.gradient: dict[str, np.ndarray] = {}
        self.teacher = self._teacher(kind)
        self.student = self._teacher("live")

        def loss(*arguments, **named):
            found = composer_loss(actor, self.section, *arguments, **named)
            if isinstance(found, tuple):
                self.losses.append(float(found[0].detach()))
            return found

        self.worker.set_loss_fn(loss)
        watch(self.worker.engine, self.gradient)

    def take(self) -> Outcome:
        """One update."""
        from verl.utils import tensordict_utils as tu

        from composer_verl.fields import EMA_RATE

        backbone = self.worker.engine.module.model
        for seen in (backbone, self.initial.engine.module.model if self.initial else backbone):
            seen.calls.clear()
            seen.seen.clear()
        data, info = self._batch()
        self.losses.clear()
        self.gradient.clear()
        part, size = Group.part(data), len(self.problem.rows)
        sdpo = self.section.sdpo
        if sdpo.weight > 0:
            info |= {EMA_RATE: sdpo.teacher.ema_rate} if sdpo.teacher.kind == "ema" else {}
            info["distillation_use_topk"] = sdpo.level == "topk"
        if "temperature" not in data.keys():  # noqa: SIM118  a TensorDict has no `in`
            info["temperature"] = self.problem.temperature
        tu.assign_non_tensor(
            part, global_batch_size=size, epochs=1, seed=1, dataloader_kwargs={"shuffle": False},
            calculate_entropy=False, **info,
        )  # fmt: skip
        metrics = tu.get(self.worker.train_mini_batch(part), "metrics")
        read = self.initial.engine.module.model if self.initial else backbone
        pair_forwards = backbone.calls["student"] if self.with_pairs else 0
        return Outcome(
            sum(self.losses),
            self.gradient.get(TABLE, np.zeros_like(self.problem.table)),
            self.gradient.get(HINTED, np.zeros_like(self.problem.table)),
            {name.removeprefix("actor/"): float(np.mean(values)) for name, values in metrics.items()},
            forwards={"student": backbone.calls["student"], "teacher": read.calls["teacher"], "pairs": pair_forwards},
            teacher_ids=read_by_teacher(SimpleNamespace(model=read), self.problem),
        )

    def _batch(self):
        """The rows of the update in verl's order, and what the update is told about them."""
        from composer_verl.pair_fields import RowMaker, rollout_fields, stacked, step_sides
        from composer_verl.pair_layout import lay_out

        rows = [self._rollout(row) for row in self.problem.rows]
        if self.section.sdpo.weight > 0:
            _join(rows, self._sdpo_fields())
        if not self.with_pairs:
            return stacked(rows), {"mini_batch_size": len(rows), "micro_batch_size_per_gpu": self.rows_per_micro}
        groups = max(1, self.rows_per_micro // 2)
        numbers = list(range(len(self.problem.pairs)))
        layout = lay_out(
            [len(row["input_ids"]) for row in rows], [numbers], ranks=self.layout.ranks, groups_per_micro=groups
        )
        own = None if self.problem.temperature == 1.0 else self.problem.temperature
        maker = RowMaker(rows[0], 0, own)
        _join(rows, rollout_fields([len(row["responses"]) for row in rows], own))
        pairs, reference = self._pairs()
        made = iter([maker.sample(side) for side in step_sides(layout.rows, pairs, reference)])
        merged = [rows[row.rollout] if row.rollout is not None else next(made) for row in layout.rows]
        info = {"mini_batch_size": layout.slot_rows * self.layout.ranks, "force_group_size": 2}
        return stacked(merged), {**info, "micro_batch_size_per_gpu": groups}

    def _pairs(self):
        from composer_plugins.channels.pair_stream import TokenizedPair

        pairs = [
            TokenizedPair(str(i), list(p.context), list(p.chosen), list(p.rejected), p.weight)
            for i, p in enumerate(self.problem.pairs)
        ]
        references = ((p.ref_chosen.tolist(), p.ref_rejected.tolist()) for p in self.problem.pairs)
        return pairs, dict(enumerate(references))

    @staticmethod
    def _rollout(row) -> dict[str, torch.Tensor]:
        from composer_verl.pair_fields import text_fields

        fields = text_fields(list(row.prompt), list(row.completion))
        mask = torch.tensor(row.sampled).long()
        fields |= {"response_mask": mask, "loss_mask": mask.clone()}
        fields["old_log_probs"] = torch.tensor(row.old_logprobs, dtype=torch.float32)
        fields["advantages"] = torch.full((len(mask),), row.advantage, dtype=torch.float32)
        return fields

    def _sdpo_fields(self):
        """What the driver's `HintedRows` adds to the step, by its own code."""
        from composer_plugins.channels.levels import SignalLevel
        from composer_verl.error_turns import HintedTurn
        from composer_verl.hinted_rows import HintedRows

        turns = [
            HintedTurn(number, t.start, t.end, list(row.sampled[t.start : t.end]), list(row.hinted_context(t)), "h", "recorded")
            for number, row in enumerate(self.problem.rows)
            for t in row.turns
        ]  # fmt: skip
        made = object.__new__(HintedRows)
        made.config, made.level = self.section.sdpo, SignalLevel(self.section.sdpo.level)
        made.teacher, made.student = self.teacher, self.student
        made._mini_batches = lambda count: [0] * count
        ids = [SimpleNamespace(prompt_ids=list(r.prompt), response_ids=list(r.completion)) for r in self.problem.rows]
        return made._fields(ids, turns)

    def _teacher(self, kind: str):
        from omegaconf import OmegaConf

        from composer_plugins.config import TeacherWeights
        from composer_verl.teachers import Teacher

        limits = {"log_prob_use_dynamic_bsz": False, "log_prob_micro_batch_size_per_gpu": 2}
        part = {"rollout": {"temperature": self.problem.temperature, **limits}, "ref": limits}
        trainer = SimpleNamespace(
            config=OmegaConf.create({"actor_rollout_ref": part}), actor_rollout_wg=Group(self.worker), ref_in_actor=False,
            ref_policy_wg=Group(self.initial), tokenizer=SimpleNamespace(eos_token_id=0),
        )  # fmt: skip
        return Teacher(TeacherWeights(kind=kind), trainer)


def _join(rows: list[dict[str, torch.Tensor]], fields) -> None:
    for name in fields.keys():  # noqa: SIM118
        for row, value in zip(rows, fields[name].unbind(), strict=True):
            row[name] = value
