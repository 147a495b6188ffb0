"""Everything that is wrong with the `composer` section of a verl run, found on the driver before Ray starts.

`composer-rl validate` and `train` ask `check_config`; `ComposerTrainer` raises the same for runs that are started with
`python -m verl.trainer.main_ppo`. A configuration that would train something else than it says does not train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from composer_plugins.config import AdvantageConfig, ComposerConfig, parse_section
from composer_plugins.errors import ComposerError, ConfigError
from composer_verl import outer
from composer_verl.section import PREFIX, advantage_options, knows_channels, logger, plain, refuse_channels

#: verl's engines on which the channels were made to work; `composer_fsdp2` is ours (a moving average beside fsdp2).
ENGINES = ("fsdp", "fsdp2", "composer_fsdp2")


def check_config(config: Any) -> list[str]:
    """Return what is wrong with the `composer` section of a run, as sentences with the fix; empty when it can start.

    Args:
        config: verl's whole configuration (DictConfig), whatever its `trainer_mode`.
    """
    from composer_verl.checks import check, section_of

    try:
        section = section_of(config)
    except ConfigError as error:
        return str(error).splitlines()
    _remark_unused_hints(config, section)
    if not knows_channels(config.trainer.v1.trainer_mode):
        return [*refuse_channels(section), *_ask(STOCK, config, section), *outer.problems(config)]
    _remark_precision(config, section)
    looks = (check, _objective, _advantage, _engine, _hint_sources, _pairs)
    return list(dict.fromkeys([*outer.problems(config), *_ask(looks, config, section)]))


def refuse_unread(config: Any) -> None:
    """Raise when a run on one of verl's own trainers would leave options of `composer.policy` unread.

    For runs that are started with `main_ppo`, where the first part of ours that sees the whole configuration is the
    advantage estimator. `ComposerTrainer` has checked all of it by then.

    Args:
        config: verl's whole configuration (DictConfig).

    Raises:
        ConfigError: as `check_config` says it.
    """
    from composer_verl.checks import section_of

    if knows_channels(config.trainer.v1.trainer_mode):
        return
    if found := _ask(STOCK, config, section_of(config)):
        raise ConfigError("This configuration would not train what it says:\n" + "\n".join(found))


def _ask(looks, config: Any, section: ComposerConfig) -> list[str]:
    """Everything that the given checks say, whether they return it or raise."""
    found = []
    for look in looks:
        try:
            found += look(config, section) or []
        except ComposerError as error:
            found += str(error).splitlines()
    return found


def _objective(config: Any, section: ComposerConfig) -> list[str]:
    """An objective that the section names must be the one that the policy loss trains."""
    mode = str(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    named = _given(config).get("objective", "host")
    if section.policy.weight == 0 or named == "host" or mode == PREFIX + named:
        return []
    return [
        f"composer.policy.objective is {named}, but actor_rollout_ref.actor.policy_loss.loss_mode={mode} trains another "
        f"one: set loss_mode={PREFIX}{named}, or composer.policy.objective=host for verl's own loss modes."
    ]


def _unread(config: Any, section: ComposerConfig) -> list[str]:
    """On verl's own trainers `composer.policy` reaches the policy losses of ours only, and those that are given it.

    Raises:
        ConfigError: `policy_loss.composer` says something else.
    """
    from composer_verl.checks import check_policy

    mode = str(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    given = _given(config)
    if mode.startswith(PREFIX):
        name = mode.removeprefix(PREFIX)
        if set(given) - {"objective"} and given.get("objective", "host") in ("host", name):  # else `_objective` says it
            whole = plain(config.get("composer", None) or {})
            check_policy(config, parse_section({**whole, "policy": {**given, "objective": name}}))
        return []
    unread = sorted(key for key in given if key not in ("objective", "weight", "advantage"))
    unread += ["weight"] * (section.policy.weight != 1)
    if not unread:
        return []
    return [
        f"composer.policy ({', '.join(unread)}) has no effect on verl's own loss_mode={mode} and trainer: set "
        f"actor_rollout_ref.actor.policy_loss.loss_mode={PREFIX}<objective>, or take it out."
    ]


def _advantage(config: Any, section: ComposerConfig) -> list[str]:
    """`policy.advantage` must be what the advantage estimator reads, which is `algorithm.composer`."""
    estimator, where, wanted = str(config.algorithm.adv_estimator), "composer", section.policy.advantage
    read = advantage_options(config.algorithm) if estimator.startswith(PREFIX) else None
    if not set(_given(config)) - {"objective"}:
        where = "policy_loss.composer"
        own = plain(config.actor_rollout_ref.actor.policy_loss.get("composer", None) or {})
        if not own:
            return []
        wanted = parse_section(own).policy.advantage
    if wanted == (AdvantageConfig() if read is None else read):
        return []
    if read is None:
        return [
            f"{where}.policy.advantage has no effect on verl's own algorithm.adv_estimator={estimator}: set it to "
            f"{PREFIX}<objective>, or take the key out."
        ]
    return [
        f"{where}.policy.advantage is not what the advantage estimator reads: set algorithm.composer.policy.advantage to "
        "the same (`algorithm.composer: ${composer}`)."
    ]


#: What is asked about `composer.policy` on verl's own trainers.
STOCK = (_objective, _unread, _advantage)


def _given(config: Any) -> dict[str, Any]:
    """What the run says under `composer.policy`."""
    return plain(config.get("composer", None) or {}).get("policy") or {}


def _engine(config: Any, section: ComposerConfig) -> list[str]:
    """What the training engine must be for the channels in use."""
    strategy = str(config.actor_rollout_ref.actor.strategy)
    used = [name for name in ("sdpo", "replay_dpo") if getattr(section, name).weight > 0]
    if not used or strategy in ENGINES:
        return []
    return [
        f"actor_rollout_ref.actor.strategy={strategy}: {' and '.join(used)} were made for verl's FSDP engines and tried "
        "on no other: set strategy=fsdp2 (model_engine=dp), or the weights to 0 (the policy objectives work on every "
        "engine)."
    ]


def _hint_sources(config: Any, section: ComposerConfig) -> list[str]:
    """At least one of the sources must be able to give a hint."""
    if section.sdpo.weight == 0:
        return []
    if not section.sdpo.hint.sources:
        return ["composer.sdpo.hint.sources is empty: no turn would have a self-teacher. Name at least one source."]
    missing = {source: _no_source(source, config) for source in section.sdpo.hint.sources}
    if None in missing.values():
        return []
    reasons = "; ".join(f"{source}: {why}" for source, why in missing.items())
    return [f"composer.sdpo.weight is above 0, but no source of composer.sdpo.hint.sources can give a hint: {reasons}."]


def _remark_unused_hints(config: Any, section: ComposerConfig) -> None:
    """Hints that were recorded for a run which does not read them: possible on purpose, so no error."""
    sdpo, columns = section.sdpo, _columns(config)
    if (
        columns is None
        or "hint" not in columns[0] | columns[1]
        or (sdpo.weight > 0 and "recorded" in sdpo.hint.sources)
    ):
        return
    why = "composer.sdpo.weight is 0" if sdpo.weight == 0 else "composer.sdpo.hint.sources does not name `recorded`"
    logger.warning("the training data has recorded hints (`hint`), and none of them is used: %s.", why)


def _remark_precision(config: Any, section: ComposerConfig) -> None:
    """A reference worker that rounds otherwise than the actor: a difference that is no hint's and no update's."""
    from verl.trainer.ppo.utils import need_reference_policy

    from composer_verl.teachers import lora

    teacher = section.sdpo.weight > 0 and section.sdpo.teacher.kind == "reference"
    reads = teacher or (section.replay_dpo.weight > 0 and need_reference_policy(config))
    parts = config.actor_rollout_ref
    actor, ref = (_precision(part.get("fsdp_config", None) or {}) for part in (parts.actor, parts.ref))
    if reads and not lora(config) and actor != ref:
        logger.warning(
            "verl's reference worker computes in %s and the actor in %s, so that the reference differs from the initial "
            "actor by more than rounding: set actor_rollout_ref.ref.fsdp_config.mixed_precision to the actor's "
            "(docs/how-to/verl.md).",
            ref, actor,
        )  # fmt: skip


def _precision(fsdp_config: Any) -> str:
    """What verl's FSDP engines compute in: bf16 without `mixed_precision`."""
    name = str((fsdp_config.get("mixed_precision", None) or {}).get("param_dtype", "bf16"))
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)


def _no_source(source: str, config: Any) -> str | None:
    """Why a source cannot give a hint in this run, or None when it may."""
    rollout = config.actor_rollout_ref.rollout
    match source:
        case "recorded":
            columns = _columns(config)
            if columns is None or "hint" in columns[0] | columns[1]:
                return None
            return "the training data has no column `hint`, nor `hint` inside `extra_info`"
        case "rollout":
            return _no_tool_turns(config)
        case "feedback":
            if config.reward.custom_reward_function.path or rollout.agent.agent_loop_config_path:
                return None
            return (
                "verl's built-in rewards say nothing in words (set reward.custom_reward_function to one that returns "
                "{'score': ..., 'feedback': text})"
            )
        case _:
            return None if int(rollout.n) > 1 else "a group of one has no sibling (rollout.n above 1)"


def _no_tool_turns(config: Any) -> str | None:
    """Why no rollout can have a tool result: the agent loop that has none, for every row."""
    agent = config.actor_rollout_ref.rollout.agent
    if agent.default_agent_loop != "single_turn_agent" or agent.get("agent_loop_manager_class"):
        return None
    columns = _columns(config)
    if columns is None or "agent_name" in columns[0]:
        return None
    return "rollouts have one turn (set rollout.agent.default_agent_loop=tool_agent and the tools)"


def _columns(config: Any) -> tuple[set[str], set[str]] | None:
    """Return the columns of the first training file and the fields of its `extra_info`; None: it cannot be read here."""
    if config.data.custom_cls.path:
        return None
    files = config.data.train_files
    first = Path(str(files if isinstance(files, str) else next(iter(files), ""))).expanduser()
    if first.suffix != ".parquet" or not first.is_file():
        return None
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(first)
    except (OSError, pyarrow.ArrowException):
        return None
    inner: set[str] = set()
    if "extra_info" in schema.names:
        kind = schema.field("extra_info").type
        inner = {kind.field(i).name for i in range(kind.num_fields)} if pyarrow.types.is_struct(kind) else set()
    return set(schema.names), inner


def _pairs(config: Any, section: ComposerConfig) -> list[str]:
    """The pairs file, read as the run will read it where the model's tokenizer is on this machine."""
    if section.replay_dpo.weight == 0:
        return []
    from composer_plugins.traces.schema import Pair
    from composer_plugins.traces.store import read_manifest, read_stage
    from composer_verl.pair_checks import refuse

    path, found = Path(section.replay_dpo.pairs), []
    try:
        refuse(config)
    except ComposerError as error:
        found += str(error).splitlines()
    if not path.exists():
        return [*found, f"composer.replay_dpo.pairs: {path} does not exist: run `composer-rl pairs`."]
    try:
        if not read_manifest(path).written:
            return [
                *found,
                f"composer.replay_dpo.pairs: {path} holds no pair: run `composer-rl pairs` on more replays.",
            ]
        next(read_stage(path, Pair))
        tokenizer = None if found else _tokenizer(config)
        if tokenizer is not None:
            from composer_verl.pair_rows import PairRows

            PairRows(section, config, tokenizer)
    except ComposerError as error:
        found.append(f"composer.replay_dpo.pairs: {error}")
    return found


def _tokenizer(config: Any) -> Any:
    """The model's tokenizer when its folder is on this machine, else None: nothing is downloaded for a check."""
    model = config.actor_rollout_ref.model
    folder = Path(str(model.get("tokenizer_path", None) or model.path)).expanduser()
    if not folder.is_dir():
        return None
    from verl.utils import hf_tokenizer

    return hf_tokenizer(str(folder), trust_remote_code=model.get("trust_remote_code", False))
