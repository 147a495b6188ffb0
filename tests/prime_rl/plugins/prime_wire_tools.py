"""prime-rl's own wire in one process: environment server, client, train sink, packer, transport, loader, compute_loss.

Every part is prime-rl's or verifiers'; only the engine behind the HTTP server is a stand-in (`prime_policy_server`).
"""

from __future__ import annotations

import asyncio
import inspect
import uuid
from pathlib import Path

import torch
import verifiers.v1 as vf
from verifiers.v1.serve.server import EnvServer

CALL = '<tool_call>\n{"name": "bash", "arguments": {"command": "cat a.txt"}}\n</tool_call>'
MISSING = "cat: a.txt: No such file or directory"
RENDERER = {"name": "custom", "import_path": "composer_toy.ToyRenderer"}
SDPO = {"weight": 0.5, "teacher": {"kind": "live"}, "hint": {"sources": ["rollout"]}}


def toy_env(tasks, sdpo=SDPO, **more) -> dict:
    """`[env]` of the toy taskset inside our wrapper."""
    return {
        "id": "composer-prime-rl",
        "taskset": {"id": "composer-toy", "tasks": tasks},
        "agent": {"runtime": {"type": "subprocess"}},
        "composer": {"sdpo": sdpo},
        **more,
    }


def orchestrator_config(server, tokenizer_dir, sources, *, batch_size, output_dir, **more):
    """prime-rl's own `OrchestratorConfig`."""
    from prime_rl.configs.orchestrator import OrchestratorConfig

    data = {
        "model": {"name": str(tokenizer_dir), "client": {"base_url": server.base_url, "api_key_var": "UNSET_KEY"}},
        "renderer": RENDERER,
        "train": {"source": sources, "sampling": {"temperature": 1.0}},
        "batch_size": batch_size,
        "seq_len": 1024,
        "output_dir": str(output_dir),
        "rollout_transport": {"type": "filesystem"},
        **more,
    }
    return OrchestratorConfig.model_validate(data)


class Wire:
    """The orchestrator's half: rolls out, sinks, packs and sends; `batch` is what its sink shipped."""

    def __init__(self, config, server) -> None:
        from prime_rl.orchestrator.envs import TrainEnvs
        from prime_rl.orchestrator.packing import BatchPacker
        from prime_rl.orchestrator.train_sink import TrainSink
        from prime_rl.orchestrator.types import Progress
        from prime_rl.utils.client import InferencePool

        self.config, self.server = config, server
        self.pool = InferencePool(
            config.model.client, model_name=server.name, train_client_type="renderer", renderer_config=config.renderer
        )
        self.pool.train_client.renderer_model_name = config.model.name
        self.envs = TrainEnvs(
            config.train.source, dict.fromkeys(config.env_addresses, ""), policy_pool=self.pool,
            renderer_config=config.renderer,
        )  # fmt: skip
        options = {"mm_token_type_ids_mapping": None, "batch_size": config.batch_size, "token_batch_size": None}
        if "progress" in inspect.signature(TrainSink).parameters:  # newer than 0.8.1.dev53
            options["progress"] = Progress()
        self.sink = TrainSink(config, tokenizer=server.tokenizer, train_envs=self.envs, **options)
        self.packer = BatchPacker(config)
        self.episodes: list[vf.Episode] = []

    async def roll_out(self):
        """Play every task of every source group_size times; return prime-rl's `TrainBatch`, or None."""
        from verifiers.v1.serve import EnvClient

        batch = None
        for env in self.envs:
            await env.algorithm.setup()
            remote = EnvServer(env.config.env, address="tcp://127.0.0.1:0")
            serving = asyncio.create_task(remote.run())
            env._env_client = EnvClient(address=remote.address)
            try:
                for task in vf.load_taskset(env.config.env.taskset):
                    group = uuid.uuid4().hex
                    for _ in range(env.config.group_size):
                        shipped = await self.sink.add(await self._episode(env, task, group))
                        batch = shipped or batch
            finally:
                await env._env_client.close()
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
        return batch

    async def _episode(self, env, task, group: str) -> vf.Episode:
        data = task.data.model_dump(mode="json")
        episode = await env.run(self.pool.train_client, self.server.name, "v0", data)
        episode.env.name = env.name  # as the dispatcher does
        episode.group = vf.GroupInfo(id=group)
        episode.record_run(
            vf.TrainRunInfo(id="test", work=vf.TrainWorkInfo(step=1, policy=vf.PolicySpan(start=0, end=0)))
        )
        self.episodes.append(episode)
        return episode

    def send(self, samples, step: int = 1) -> None:
        """Pack and write the micro-batches, as the orchestrator does."""
        from prime_rl.transports.rollouts import setup_micro_batch_sender

        sender = setup_micro_batch_sender(
            Path(self.config.output_dir), self.config.num_train_workers, step, self.config.rollout_transport
        )
        asyncio.run(sender.send(self.packer.pack(samples)))


def micro_batches(output_dir, step: int = 1) -> list[dict]:
    """What prime-rl's trainer receives, as tensors."""
    from prime_rl.configs.shared import FileSystemTransportConfig
    from prime_rl.trainer.rl.data import DataLoader

    loader = DataLoader(Path(output_dir), step, 1, FileSystemTransportConfig())
    loader.wait_for_batch()
    return loader.get_batch()


def scales(batches: list[dict]) -> tuple[int, int, int]:
    """The three denominators, counted as prime-rl's train loop counts them (src/prime_rl/trainer/rl/train.py)."""
    rl = ce = ref = 0
    for batch in batches:
        mask, weights = batch["loss_mask"], batch["rl_weights"]
        rl += int((mask & (weights != 0)).sum()) if weights is not None else int(mask.sum())
        ce += int((batch["ce_weights"] != 0).sum()) if batch["ce_weights"] is not None else 0
        ref += int((batch["ref_kl_weights"] != 0).sum()) if batch["ref_kl_weights"] is not None else 0
    return max(rl, 1), max(ce, 1), max(ref, 1)


def backward(model, batches: list[dict], loss_config) -> tuple[float, dict, list[torch.Tensor]]:
    """prime-rl's `compute_loss` on every micro-batch, then backward; (loss, metrics, log-probs with their gradients)."""
    from prime_rl.trainer.rl.loss import compute_loss, setup_rl_loss_fn

    loss_fn, (rl, ce, ref) = setup_rl_loss_fn(loss_config), scales(batches)
    total, metrics, kept = 0.0, {}, []
    for batch in batches:
        lengths = batch["sequence_lengths"]
        logprobs = torch.cat(
            [_logprobs(model, ids, t) for ids, t in _rows(batch["input_ids"], batch["temperatures"], lengths)]
        )
        logprobs.retain_grad()
        kept.append(logprobs)

        def split(name, batch=batch, lengths=lengths):
            return batch[name].squeeze(0).split(lengths) if batch[name] is not None else None

        loss, found = compute_loss(
            trainer_logprobs=logprobs.split(lengths), inference_logprobs=split("inference_logprobs"),
            ref_logprobs=split("ref_logprobs"), advantages=split("advantages"), loss_mask=split("loss_mask"),
            rl_weights=split("rl_weights"), ce_weights=split("ce_weights"), ref_kl_weights=split("ref_kl_weights"),
            rl_loss_fn=loss_fn, rl_scale=rl, ce_scale=ce, ref_kl_scale=ref,
        )  # fmt: skip
        loss.backward()
        total += float(loss.detach())
        for name, value in found.items():
            metrics.setdefault(name, []).append(value.detach())
    return total, {name: torch.cat(values) for name, values in metrics.items()}, kept


def _rows(ids, temperatures, lengths):
    return zip(ids.squeeze(0).split(lengths), temperatures.squeeze(0).split(lengths), strict=True)


def _logprobs(model, ids: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Log-prob of every token of one sequence (0 for the first), at the sampling temperature, with gradient."""
    logits = model(input_ids=ids[None]).logits[0].float() / temperatures[:, None]
    rows = logits[:-1].log_softmax(-1)
    values = rows.gather(-1, ids[1:, None])[:, 0]
    return torch.cat([values.new_zeros(1), values])


def gradient(model) -> torch.Tensor:
    """All parameter gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
