"""The TRL recipe: a YAML file with GRPOConfig's own keys under `trainer` and our section under `composer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from composer_plugins.config import ComposerConfig, Section, apply_override, explain, read_yaml
from composer_plugins.errors import ConfigError


class DataConfig(Section):
    """Which states become prompts."""

    states: Path
    """States stage file (`composer-rl hints`)."""
    traces: Path | None = None
    """Traces stage file: the tools that prompts show, and the recorded workspace, come from it."""
    replays: Path | None = None
    """Replays stage file: the teachers' majority action is a target of the reward."""
    limit: int | None = Field(None, gt=0)
    """Use at most this many states, hinted and others in turn."""
    only_hinted: bool = False
    """Use only states that have a hint."""
    hints: bool = True
    """False: take the hints out of the data (the sdpo channel then has only what rollouts give it)."""


class LoraSection(Section):
    """A fresh LoRA adapter (peft.LoraConfig)."""

    r: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str = "all-linear"


class CheckConfig(Section):
    """Promises that the run checks about itself at its end; a broken one fails the run."""

    groups_with_spread: float = Field(0.0, ge=0, le=1)
    """Smallest share of groups whose rewards differ."""
    hinted_turns: int = Field(0, ge=0)
    """Fewest error turns trained on under a hint."""
    pairs: int = Field(0, ge=0)
    """Fewest pairs trained on."""
    gradient_norms: bool = False
    """Every channel with weight above 0 had a gradient norm above 0 (needs monitor.grad_norms_every)."""


class Recipe(Section):
    """A run on TRL."""

    host: Literal["trl"]
    model: str
    """Hub name, local path, or the alias smollm2-135m-instruct."""
    warm_start: bool = False
    """Merge the shipped warm start for tool calls into smollm2-135m-instruct."""
    tool_template: bool = False
    """Use our ChatML template and parser for tool calls instead of the tokenizer's template."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    lora: LoraSection | None = None
    """None: all parameters are trained."""
    data: DataConfig
    environment: Literal["recorded_workspace"] | None = None
    """recorded_workspace: tool calls are answered from the recorded session, so rollouts have several turns.
    None: single-turn rollouts; the tools are shown and calls are scored, not answered."""
    reward: str = "tool_call"
    """Reward plugin."""
    output_dir: Path
    threads: int | None = Field(None, gt=0)
    """CPU threads of torch; None: torch's default."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Keys of TRL's GRPOConfig."""
    composer: ComposerConfig = ComposerConfig()
    checks: CheckConfig = CheckConfig()
    sized_down: list[str] = Field(default_factory=list)
    """What this recipe makes smaller than a real run; printed in the summary and the report."""


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `a.b=value` strings; values are read as YAML.

    Raises:
        ConfigError: one line per problem.
    """
    data = read_yaml(path)
    for override in overrides or []:
        apply_override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(error)}") from error


def trainer_arguments(recipe: Recipe):
    """Build the `ComposerGRPOConfig` of a recipe. Raises `ConfigError` on keys that GRPOConfig does not have."""
    from dataclasses import fields

    from composer_trl.config import ComposerGRPOConfig

    known = {f.name for f in fields(ComposerGRPOConfig)}
    unknown = sorted(set(recipe.trainer) - known)
    if unknown:
        raise ConfigError(
            f"`trainer` has keys that TRL's GRPOConfig does not: {', '.join(unknown)}. Check the spelling."
        )
    reserved = sorted({"output_dir", "composer"} & set(recipe.trainer))
    if reserved:
        raise ConfigError(f"`trainer.{reserved[0]}` belongs at the top level of the recipe: move it there.")
    defaults = {
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False,
        "shuffle_dataset": False,
    }  # fmt: skip
    try:
        return ComposerGRPOConfig(
            output_dir=str(recipe.output_dir),
            composer=recipe.composer.model_dump(mode="json"),
            **{**defaults, **recipe.trainer},
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"TRL refuses the `trainer` section: {error}") from error
