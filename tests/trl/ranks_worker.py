"""One optimizer step on the ranks of this launch; rank 0 writes how far the parameters moved. Run by test_ranks.py."""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import build_model, build_tokenizer


def main(settings: dict) -> None:
    from composer_trl import ComposerGRPOConfig, ComposerGRPOTrainer
    from datasets import Dataset

    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    words = ["a", "bb", "ccc", "dddd"]
    rows = [{"prompt": [{"role": "user", "content": f"count {w}"}], "hint": f"it is {len(w)}" * len(w)} for w in words]
    rows[1]["hint"] = None  # ranks have different numbers of hinted turns

    def reward(completion_ids, **_):  # by global row, so that one rank and two see the same rewards
        return [float((rank * len(completion_ids) + i) % 3) for i in range(len(completion_ids))]

    def rollout(prompts, trainer):
        """Completions that depend on the global row only, of different lengths; sampling would differ by rank."""
        first = rank * len(prompts)
        completions = [
            [3 + (37 * (first + i) + 11 * t) % 300 for t in range(2 + (first + i) % 6)] + [tokenizer.eos_token_id]
            for i in range(len(prompts))
        ]
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completions,
            "logprobs": [[0.0] * len(ids) for ids in completions],
        }

    args = ComposerGRPOConfig(
        output_dir=settings["output_dir"], per_device_train_batch_size=8 // world, num_generations=2,
        max_completion_length=8, max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=1e9, report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False, seed=7, shuffle_dataset=False, composer=settings["composer"],
    )  # fmt: skip
    trainer = ComposerGRPOTrainer(
        model, reward, args, Dataset.from_list(rows), processing_class=tokenizer, rollout_func=rollout
    )
    trainer.train()
    if rank == 0:
        moved = torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])
        torch.save(moved - start, settings["result"])
        Path(settings["result"]).with_suffix(".json").write_text(
            json.dumps(trainer.state.log_history[0], default=float)
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort the interpreter's own shutdown ("terminate called without ...")
