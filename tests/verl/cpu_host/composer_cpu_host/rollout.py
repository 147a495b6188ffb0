"""A rollout server that samples with transformers on a CPU: token ids in, token ids and log-probs out.

Two environment variables of a run change what it answers:

    COMPOSER_CPU_NOISE   standard deviation, nats: the log-probs that it reports are off by as much, as an engine's with
                         other kernels are
    COMPOSER_CPU_FIRST   a JSON list of texts: the first turn of every conversation is one of them, in turn, since a
                         random model makes no tool calls; what the model samples after them is at most 6 tokens
"""

import asyncio
import json
import os

import ray
import torch
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput


class ServerAdapter(BaseRollout):
    """In the training process: sends the weights to the server of its replica."""

    def __init__(self, config, model_config, device_mesh, replica_rank: int = -1):
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank

    @property
    def server(self):
        return ray.get_actor(f"hf_cpu_server_{self.replica_rank}")

    async def resume(self, tags) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights, wire_format: str = "named_tensors", global_steps=None, **kwargs) -> None:
        assert wire_format == "named_tensors"
        state = {name: tensor.detach().float().cpu().clone() for name, tensor in weights}
        await self.server.load.remote(state, global_steps)


class HFReplica(RolloutReplica):
    """One server per trainer process."""

    async def launch_servers(self) -> None:
        server = ray.remote(HFServer).options(name=f"hf_cpu_server_{self.replica_rank}", max_concurrency=64)
        self.servers = [server.remote(self.config, self.model_config)]
        await self.servers[0].ready.remote()
        self._server_handle, self._server_address = self.servers[0], f"hf_cpu:{self.replica_rank}"


class HFServer:
    """The model, and what verl's trainer and clients ask of a server."""

    def __init__(self, config, model_config):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        model_config: HFModelConfig = omega_conf_to_dataclass(model_config)
        self.config = config
        # Random weights: whatever it samples sensibly, the trainer has sent (load_format: dummy).
        torch.manual_seed(4711)
        self.model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(model_config.local_path), dtype=torch.float32
        ).eval()
        self.tokenizer, self.steps, self.lock = model_config.tokenizer, None, asyncio.Lock()
        self.eos = self.tokenizer.eos_token_id
        self.noise = float(os.environ.get("COMPOSER_CPU_NOISE", 0))
        self.first, self.asked = json.loads(os.environ.get("COMPOSER_CPU_FIRST", "[]")), 0
        self.generator = torch.Generator().manual_seed(int(config.seed))

    async def ready(self) -> None: ...

    async def load(self, state, global_steps) -> None:
        async with self.lock:
            known = self.model.state_dict()
            tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
            assert set(state) - set(known) == set() and set(known) - set(state) <= tied, set(known) ^ set(state)
            moved = max(float((known[name] - value).abs().max()) for name, value in state.items())
            self.model.load_state_dict(state, strict=False)
            self.model.tie_weights()
            self.steps = global_steps
            print(f"hf_cpu weights at step {global_steps}: moved {moved:.3e}", flush=True)

    async def generate(self, prompt_ids, sampling_params, request_id, **_) -> TokenOutput:
        async with self.lock:
            ids, log_probs, reason = await asyncio.to_thread(self._sample, list(prompt_ids), dict(sampling_params))
        extra = {"global_steps": self.steps}
        return TokenOutput(token_ids=ids, log_probs=log_probs, stop_reason=reason, extra_fields=extra)

    @torch.no_grad()
    def _sample(self, prompt, params):
        temperature = float(params.get("temperature", 1.0))
        limit = int(params.get("max_tokens") or params.get("max_new_tokens") or self.config.response_length)
        script = self._script(prompt)
        limit = min(limit, len(script) or 6) if self.first else limit
        inputs, cache, ids, log_probs = torch.tensor([prompt]), None, [], []
        while len(ids) < limit:
            out = self.model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits[0, -1].float()
            if temperature == 0:
                token, logp = int(logits.argmax()), 0.0
            else:
                scores = torch.log_softmax(logits / temperature, -1)
                token = int(torch.multinomial(scores.exp(), 1, generator=self.generator))
                token = script[len(ids)] if script else token
                logp = float(scores[token] + self.noise * torch.randn((), generator=self.generator))
            ids.append(token)
            log_probs.append(logp)
            if token == self.eos:
                return ids, log_probs, "completed"
            inputs = torch.tensor([[token]])
        return ids, log_probs, "length"

    def _script(self, prompt) -> list[int]:
        """The ids of a conversation's first turn, when the run gives them."""
        if (
            not self.first
            or "<|im_start|>assistant" in self.tokenizer.decode(prompt)[: -len("<|im_start|>assistant\n")]
        ):
            return []
        self.asked += 1
        text = self.first[(self.asked - 1) % len(self.first)]
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.eos]

    async def set_global_steps(self, steps) -> None:
        self.steps = steps

    async def wake_up(self, *_, **__) -> None: ...

    async def sleep(self, *_, **__) -> None: ...

    async def abort_all_requests(self, *_, **__) -> None: ...

    async def resume_generation(self) -> None: ...

    async def clear_kv_cache(self) -> None: ...

    async def release_kv_cache(self) -> None: ...

    async def resume_kv_cache(self) -> None: ...
