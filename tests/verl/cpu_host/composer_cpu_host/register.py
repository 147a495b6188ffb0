"""verl's FSDP2 engine for the device "cpu", and the rollout "hf_cpu"."""

NAME = "hf_cpu"


def register() -> None:
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.rollout import base
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    class CPUEngine(FSDPEngineWithLMHead):
        """verl's engine; the reference worker's without offloading to pinned memory, which needs an accelerator."""

        def _build_fsdp_module(self, module):
            forward_only = self.engine_config.forward_only
            object.__setattr__(self.engine_config, "forward_only", False)
            try:
                return super()._build_fsdp_module(module)
            finally:
                object.__setattr__(self.engine_config, "forward_only", forward_only)

    EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")(CPUEngine)
    base._ROLLOUT_REGISTRY[(NAME, "async")] = "composer_cpu_host.rollout.ServerAdapter"
    RolloutReplicaRegistry.register(NAME, _replica)


def _replica():
    from composer_cpu_host.rollout import HFReplica

    return HFReplica
