"""Runs a TRL recipe: data in, trainer, run folder out, promises checked."""

from __future__ import annotations

import platform
import time
import warnings as python_warnings
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback

from composer_plugins.errors import ConfigError, SelfCheckError
from composer_plugins.models.loading import load_model
from composer_plugins.models.resolve import resolve_model
from composer_plugins.models.toolcalls import install_tool_template
from composer_plugins.plugins import get_plugin_manager
from composer_plugins.report.run_folder import Check, ModelInfo, RunSummary, RunWriter, StageCount
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.store import manifest_path, read_manifest, read_stage
from composer_trl.callbacks import RunFolderCallback
from composer_trl.dataset import build_dataset, read_rows
from composer_trl.outer import equal_adapter
from composer_trl.recipe import Recipe, trainer_arguments
from composer_trl.rewards import tool_call_reward
from composer_trl.trainer import ComposerGRPOTrainer

console = Console()

PROVENANCE = {
    "policy": "Cursor's published Composer recipe as far as public (Composer 2 report): Dr. GRPO without std.",
    "sdpo": "Cursor's published Composer 2.5 recipe as far as public: hint at the error turn, KL on that turn.",
    "replay_dpo": "Our own addition, not Cursor's: DPO on pairs from replaying the trace with teachers.",
}


def _origin(channel: str) -> str:
    """Where a channel comes from: a publication, us, or a plugin."""
    if channel in PROVENANCE:
        return PROVENANCE[channel]
    channels = get_plugin_manager().channels
    plugin = channels.provenance(channel)
    return f"A channel of the plugin {plugin}, neither Cursor's nor ours: {channels.get(channel).summary}."


def run(recipe: Recipe, *, command: str) -> Path:
    """Train a recipe and return its run folder.

    Args:
        recipe: validated.
        command: how to repeat the run, for the report.

    Raises:
        ComposerError subclasses: bad input, or a promise of `recipe.checks` that does not hold.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    started, clock = datetime.now(UTC), time.perf_counter()
    args = trainer_arguments(recipe)
    if recipe.environment is None:
        args.max_tool_calling_iterations = 0  # single turn: calls are parsed and scored, not answered
    main = args.process_index == 0
    rows = read_rows(recipe.data)
    if main:
        console.print(f"[bold]1/3 data[/]: {len(rows)} states, {sum(bool(r['hint']) for r in rows)} with a hint")
    model, tokenizer, info = prepare_model(recipe, announce=main)
    lora = _lora(recipe)
    if lora is not None and recipe.composer.outer.sync_every:
        model, lora = equal_adapter(model, lora), None
    trainer = ComposerGRPOTrainer(
        model,
        reward_funcs=tool_call_reward(get_plugin_manager().rewards.get(recipe.reward).load()(), tokenizer),
        args=args,
        train_dataset=build_dataset(rows),
        processing_class=tokenizer,
        peft_config=lora,
        environment_factory=_environment(recipe),
    )
    writer = (
        RunWriter(recipe.output_dir, existing="append" if args.resume_from_checkpoint else "replace") if main else None
    )
    with python_warnings.catch_warnings(record=True) as caught:
        python_warnings.simplefilter("default")
        if writer is not None:
            writer.recipe(recipe.model_dump(mode="json"))
            trainer.token_view_sink = writer.token_view
            trainer.remove_callback(PrinterCallback)  # one progress bar instead of a dictionary per step
            trainer.add_callback(RunFolderCallback(writer, console))
            console.print(f"[bold]3/3 training[/]: {_plan(trainer)}")
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(str(recipe.output_dir / "model"))
    if writer is None:
        return recipe.output_dir
    summary = RunSummary(
        name=recipe.output_dir.name,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 1),
        host="trl",
        host_version=metadata.version("trl"),
        versions={n: metadata.version(n) for n in ("torch", "transformers", "trl", "composer-plugins")},
        seed=args.seed,
        model=info,
        sized_down=recipe.sized_down,
        stages=[StageCount.of(read_manifest(p)) for p in _stage_files(recipe)],
        provenance={c: _origin(c) for c in trainer.monitor.channels} if hasattr(trainer, "monitor") else {},
        checks=self_checks(recipe, trainer.state.log_history),
        warnings=_our_warnings(caught),
        command=command,
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, {args.device}",
    )
    _describe_data(summary, recipe)
    writer.summary(summary)
    writer.close()
    _print_summary(summary, recipe)
    failed = [c for c in summary.checks if not c.passed]
    if failed:
        raise SelfCheckError(
            "The run finished but does not keep its promises: "
            + "; ".join(f"{c.name}: expected {c.expected}, found {c.found}" for c in failed)
            + f". Everything it wrote is in {recipe.output_dir}; `composer-rl report {recipe.output_dir}` draws it."
        )
    return recipe.output_dir


def prepare_model(recipe: Recipe, *, announce: bool = True):
    """Resolve and load the model; return (model, tokenizer, ModelInfo)."""
    resolved = resolve_model(recipe.model, trust_remote_code=recipe.trust_remote_code)
    if announce:
        console.print(
            f"[bold]2/3 model[/]: {recipe.model} from {resolved.source}, weights sha256 {resolved.sha256[:16]}…"
        )
    model, tokenizer = load_model(resolved, dtype=recipe.dtype, attn_implementation=recipe.attn_implementation)
    note = ""
    if recipe.warm_start:
        from composer_plugins.models.warm_start import apply_warm_start

        model = apply_warm_start(model)
        note = "with the shipped warm start for tool calls merged in"
    if recipe.tool_template:
        install_tool_template(tokenizer)
    tokenizer.padding_side = "left"
    size = sum(p.numel() for p in model.parameters())
    info = ModelInfo(reference=recipe.model, source=resolved.source, sha256=resolved.sha256, parameters=size, note=note)
    return model, tokenizer, info


def self_checks(recipe: Recipe, history: list[dict[str, Any]]) -> list[Check]:
    """Compare what the run logged with what `recipe.checks` promises."""
    promised, checks = recipe.checks, []

    def total(name: str) -> float:
        return sum(entry[name] for entry in history if isinstance(entry.get(name), int | float))

    def check(name: str, passed: bool, found: str, expected: str) -> None:
        checks.append(Check(name=name, passed=passed, found=found, expected=expected))

    if promised.groups_with_spread:
        flat = [e["frac_reward_zero_std"] for e in history if "frac_reward_zero_std" in e]
        spread = 1 - sum(flat) / len(flat) if flat else 0.0
        check("groups with reward spread", spread >= promised.groups_with_spread, f"{spread:.0%}",
              f"at least {promised.groups_with_spread:.0%}")  # fmt: skip
    if promised.hinted_turns:
        turns = total("sdpo/hinted_turns")
        check(
            "hinted turns trained on",
            turns >= promised.hinted_turns,
            f"{turns:.0f}",
            f"at least {promised.hinted_turns}",
        )
    if promised.pairs:
        pairs = total("replay_dpo/pairs")
        check("pairs trained on", pairs >= promised.pairs, f"{pairs:.0f}", f"at least {promised.pairs}")
    if promised.gradient_norms:
        for channel in ("policy", "sdpo", "replay_dpo"):
            if getattr(recipe.composer, channel).weight > 0:
                norms = [e[f"{channel}/grad_norm"] for e in history if f"{channel}/grad_norm" in e]
                check(f"{channel} gradient norm", any(n > 0 for n in norms),
                      f"largest {max(norms):.3g} over {len(norms)} measured steps" if norms else "never measured",
                      "above 0")  # fmt: skip
    return checks


def _lora(recipe: Recipe):
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    lora = recipe.lora
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )  # fmt: skip


def _environment(recipe: Recipe):
    """The workspaces whose tools the prompts show; with `environment: null` they are shown and never run."""
    from composer_trl.environment import recorded_workspace_factory

    if recipe.data.traces is None:
        raise ConfigError("data.traces is missing: the tools that prompts show come from the traces of the states.")
    return recorded_workspace_factory(list(read_stage(recipe.data.traces, Trace)))


def _plan(trainer: ComposerGRPOTrainer) -> str:
    args = trainer.args
    channels = ", ".join(trainer.monitor.channels) if hasattr(trainer, "monitor") else "TRL's own loss"
    level = f"; sdpo level {trainer.sdpo_channel.level}" if getattr(trainer, "sdpo_channel", None) else ""
    return f"{args.max_steps} steps of {args.generation_batch_size} rollouts, channels {channels}{level}"


def _stage_files(recipe: Recipe) -> list[Path]:
    paths = [recipe.data.traces, recipe.data.states, recipe.data.replays, recipe.composer.replay_dpo.pairs]
    return [p for p in paths if p is not None and manifest_path(p).exists()]


def _our_warnings(caught) -> list[str]:
    from composer_plugins.channels.silence import SilentChannelWarning

    return [str(w.message) for w in caught if issubclass(w.category, SilentChannelWarning)]


def _describe_data(summary: RunSummary, recipe: Recipe) -> None:
    from composer_trl.provenance import pairs_by_rule, teachers

    if recipe.data.replays is not None:
        summary.teachers = teachers(recipe.data.replays)
    if recipe.composer.replay_dpo.pairs is not None and recipe.composer.replay_dpo.weight > 0:
        summary.pairs_by_rule = pairs_by_rule(recipe.composer.replay_dpo.pairs)


def _print_summary(summary: RunSummary, recipe: Recipe) -> None:
    table = Table(title=f"{summary.name}: {summary.seconds:.0f} s", show_header=False)
    table.add_row("model", f"{summary.model.reference} ({summary.model.source}, {summary.model.sha256[:16]}…)")
    for check in summary.checks:
        mark = "[green]kept[/]" if check.passed else "[bold red]broken[/]"
        table.add_row(f"{check.name} ({check.expected})", f"{mark}: {check.found}")
    for line in summary.sized_down:
        table.add_row("sized down", line)
    for warning in summary.warnings:
        table.add_row("[bold red]warning[/]", warning)
    table.add_row("run folder", str(recipe.output_dir))
    console.print(table)
