"""Channel 3 (our addition) on verl's driver: the pair rows of every actor update.

For the trainer:

    pairs = PairRows(section, config, tokenizer)    # before the workers start: reads the file, refuses what cannot work
    pairs.begin(self)                               # once they have weights, before the first update
    batch = pairs.add(batch, trainer)               # in `_update_actor`: the rollouts and the step's pair rows
    pairs.override(batch)                           # last before the update, over the extra_info that verl filled in
    ... actor_rollout_wg.update_actor(batch) ...
    batch = pairs.remove(batch)                     # the rollouts as before; the pair rows leave TransferQueue
    metrics.update(pairs.metrics())                 # what the driver knows: tokens, seconds, pairs left out

A pair row has every tensor field of the batch's first rollout that holds one value per response token, per token or
per row; neutral values (zero) keep it out of every term but its own. Other fields do not reach the loss.
"""

from __future__ import annotations

import logging
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_plugins.channels.pair_stream import REFERENCE_FILE, PairStream
from composer_plugins.config import ComposerConfig
from composer_plugins.errors import ConfigError
from composer_verl.pair_checks import refuse, row_temperature
from composer_verl.pair_fields import TEMPERATURE, RowMaker, rollout_fields, stacked, step_sides
from composer_verl.pair_layout import FILLER_TOKENS, Layout, lay_out
from composer_verl.pair_reference import score

if TYPE_CHECKING:
    from transfer_queue import KVBatchMeta

logger = logging.getLogger("composer_verl")


class PairRows:
    """Adds the pairs of channel 3 to verl's actor updates.

    Args:
        section: the `composer` section; `replay_dpo.weight` is above 0.
        config: verl's whole configuration (DictConfig).
        tokenizer: the policy's, with its chat template.

    Raises:
        UnsupportedError: an option of verl that would tear pairs apart or change their log-probs.
        ConfigError: the pairs file was filtered with another tokenizer.
        TraceError: no such file, no manifest, no pair, or none that is short enough.
    """

    def __init__(self, section: ComposerConfig, config, tokenizer) -> None:
        refuse(config)
        self.config, self.verl, self.eos = section.replay_dpo, config, tokenizer.eos_token_id
        actor = config.actor_rollout_ref.actor
        self.sequence_parallel = int(actor.get("ulysses_sequence_parallel_size") or 1)
        self.budget = actor.ppo_max_token_len_per_gpu * self.sequence_parallel if actor.use_dynamic_bsz else None
        self.stream = PairStream(
            self.config,
            tokenizer,
            seed=int(actor.data_loader_seed),
            chat_template=config.actor_rollout_ref.model.get("custom_chat_template"),
            max_pair_tokens=self.budget,
            **dict(config.data.get("apply_chat_template_kwargs") or {}),
        )
        #: Mini-batches (optimizer steps) of one step of the trainer, as planned.
        self.planned = -(-int(config.data.train_batch_size) // int(actor.ppo_mini_batch_size))
        self._rollouts: KVBatchMeta | None = None
        self._synthetic: list[str] = []
        self._layout, self._token_budget = Layout([], 0), self.budget
        self._ranks, self._metrics = 1, {}
        logger.info("replay_dpo: %d pairs; left out: %s", len(self.stream.pairs), dict(self.stream.skipped))

    # Once

    def begin(self, trainer) -> None:
        """Without a reference policy: score, under the initial weights, every pair that the run will draw.

        Call it when the workers have their weights (a checkpoint's included) and before the first update. The
        log-probs are kept in `trainer.default_local_dir`, beside the checkpoints, for a resumed run. With a reference
        policy nothing is scored here: it is frozen, so `add` asks it when a pair is drawn for the first time.

        Raises:
            ConfigError: a resumed run without the log-probs of its first run: its weights are no reference.
        """
        if trainer.use_reference_policy:
            return
        folder = self._run_folder()
        if trainer.global_steps > 0:
            self.stream.load(folder)
        steps = int(trainer.total_training_steps) - int(trainer.global_steps)
        needed = self.stream.unscored(trainer.global_steps * self.planned, steps * self.planned)
        if trainer.global_steps > 0 and needed:
            raise ConfigError(
                f"This resumed run would draw {len(needed)} pairs that the first run did not score under the initial "
                "weights (it was planned with fewer steps or fewer pairs per step). Resume with the first run's "
                "total_training_steps and pairs_per_step, or start a new run from the checkpoint's model, or give the "
                "run a reference policy (actor_rollout_ref.actor.use_kl_loss=true)."
            )
        if needed:
            self._score(trainer, needed)
            folder.mkdir(parents=True, exist_ok=True)
            self.stream.save(folder)
            logger.info("replay_dpo: %d pairs scored under the initial weights, kept in %s", len(needed), folder)

    def _run_folder(self) -> Path:
        settings = self.verl.trainer
        if settings.resume_mode == "resume_path":
            resumed = Path(settings.resume_from_path).absolute()
            if (resumed.parent / REFERENCE_FILE).exists():
                return resumed.parent
        return Path(settings.default_local_dir).absolute()

    def _score(self, trainer, pairs: list[int]) -> None:
        started = time.perf_counter()
        self.stream.reference.update(score(trainer, self.stream, pairs, self.eos))
        self._metrics["replay_dpo/reference_seconds"] = time.perf_counter() - started

    # Per step

    def add(self, batch: KVBatchMeta, trainer) -> KVBatchMeta:
        """Return the batch with the step's pair rows, which are put into TransferQueue.

        Args:
            batch: the rollouts, balanced, with everything that the loss reads already in TransferQueue.
            trainer: verl's trainer.
        """
        import transfer_queue as tq

        self._ranks = max(trainer.actor_rollout_wg._dispatch_info["actor"]) + 1
        lengths = [int(tag["seq_len"]) for tag in batch.tags]
        drawn = self.draw(trainer.global_steps, len(batch))
        if missing := sorted({i for pairs in drawn for i in pairs} - self.stream.reference.keys()):
            self._score(trainer, missing)
        self._layout = self._lay_out(lengths, drawn)

        temperature = row_temperature(self.verl)
        first = tq.kv_batch_get(keys=batch.keys[:1], partition_id=batch.partition_id)[0]
        maker = RowMaker(first, self.eos, temperature)
        samples = [
            maker.sample(side) for side in step_sides(self._layout.rows, self.stream.pairs, self.stream.reference)
        ]
        keys = [f"pair{uuid.uuid4().hex}_{i}_0" for i in range(len(samples))]
        tags = [_tag(batch.tags[0], sample) for sample in samples]
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=stacked(samples), tags=tags)
        own = rollout_fields([int(tag["response_len"]) for tag in batch.tags], temperature)
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=own)

        self._rollouts, self._synthetic = batch, keys
        tokens = sum(self.stream.pairs[i].tokens for pairs in drawn for i in pairs)
        self._metrics |= {
            "replay_dpo/tokens": tokens / len(drawn),
            "replay_dpo/filler_rows": sum(row.rollout is None and row.pair is None for row in self._layout.rows),
        }
        return self._merge(batch, keys, tags, list(samples[0]))

    def draw(self, global_step: int, rollouts: int) -> list[list[int]]:
        """Return the pairs of each mini-batch of a step of the trainer (which counts from 1).

        A step with more rollouts than planned has further mini-batches; they repeat the step's pairs, so that the
        order follows from the step alone.
        """
        options = self.verl.actor_rollout_ref
        count = max(1, rollouts // (int(options.actor.ppo_mini_batch_size) * int(options.rollout.n)))
        first = (global_step - 1) * self.planned
        return [self.stream.indices(first + number % self.planned) for number in range(count)]

    def _lay_out(self, lengths: list[int], drawn: list[list[int]]) -> Layout:
        micro = self.verl.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu
        if self.budget is not None:  # room for a filler beside the longest rollout
            self._token_budget = max(self.budget, max(lengths) + FILLER_TOKENS)
        groups = 1 if self.budget is not None else max(1, int(micro) // 2)
        return lay_out(lengths, drawn, ranks=self._ranks, token_budget=self._token_budget, groups_per_micro=groups)

    @staticmethod
    def _merge_order(layout: Layout, rollouts: list, synthetic: list) -> list:
        rest = iter(synthetic)
        return [rollouts[row.rollout] if row.rollout is not None else next(rest) for row in layout.rows]

    def _merge(self, batch: KVBatchMeta, keys: list[str], tags: list[dict], fields: list[str]) -> KVBatchMeta:
        from transfer_queue import KVBatchMeta

        return KVBatchMeta(
            keys=self._merge_order(self._layout, batch.keys, keys),
            tags=self._merge_order(self._layout, batch.tags, tags),
            partition_id=batch.partition_id,
            fields=fields,
            extra_info=batch.extra_info,
        )

    def extra_info(self) -> dict[str, Any]:
        """Return what the update must be told instead of verl's own values, rows and micro-batches of this step.

        `global_batch_size` stays verl's: the rollouts of a mini-batch, which the policy divides by.
        """
        info: dict[str, Any] = {
            "mini_batch_size": self._layout.slot_rows * self._ranks,
            "force_group_size": 2,
            "dataloader_kwargs": {"shuffle": False},
        }
        if self.budget is None:  # verl multiplies it by the group size
            micro = int(self.verl.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu)
            info["micro_batch_size_per_gpu"] = max(1, micro // 2)
        else:
            info["max_token_len_per_gpu"] = -(-self._token_budget // self.sequence_parallel)
        return info

    def override(self, batch: KVBatchMeta) -> None:
        """Put `extra_info` over what verl filled in; a temperature per row takes the place of the batch's."""
        batch.extra_info.update(self.extra_info())
        if row_temperature(self.verl) is not None:
            batch.extra_info.pop(TEMPERATURE, None)

    def remove(self, batch: KVBatchMeta) -> KVBatchMeta:
        """Clear the pair rows from TransferQueue and return the rollouts as `add` was given them."""
        import transfer_queue as tq

        rollouts, self._rollouts = self._rollouts, None
        tq.kv_clear(keys=self._synthetic, partition_id=batch.partition_id)
        self._synthetic = []
        return rollouts

    def metrics(self) -> dict[str, float]:
        """Return the driver's metrics since the last call: `replay_dpo/tokens` (of pair rows per optimizer step),
        `replay_dpo/filler_rows` (per step of the trainer), `replay_dpo/reference_seconds`."""
        values, self._metrics = self._metrics, {}
        return values


def _tag(rollout: dict[str, Any], sample) -> dict[str, Any]:
    """The tag of a pair row: verl's metrics pass over padding."""
    prompt, response = len(sample["prompts"]), len(sample["responses"])
    lengths = {"prompt_len": prompt, "response_len": response, "seq_len": prompt + response}
    return {**rollout, "is_padding": True, **lengths}
