"""Test-only: verl's rollout "hf_cpu" with a record of the weights it is sent, for runs of the whole trainer.

Loaded after `composer_cpu_host` by VERL_USE_EXTERNAL_MODULES. Writes one JSON line per weight update to OUTER_RECORD.
"""

import json
import os

from verl.workers.rollout import base

base._ROLLOUT_REGISTRY[("hf_cpu", "async")] = "outer_recorder.Adapter"


def __getattr__(name: str):
    if name != "Adapter":
        raise AttributeError(name)
    import hashlib

    from composer_cpu_host.rollout import ServerAdapter

    class Adapter(ServerAdapter):
        async def update_weights(self, weights, global_steps=None, **options) -> None:
            sent = [(key, tensor.detach().float().cpu().clone()) for key, tensor in weights]
            digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in sent)).hexdigest()
            with open(os.environ["OUTER_RECORD"], "a") as file:
                file.write(json.dumps([global_steps, digest]) + "\n")
            await super().update_weights(iter(sent), global_steps=global_steps, **options)

    return Adapter
