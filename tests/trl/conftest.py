"""A tiny real model and tokenizer, made here: no hub, seconds on a CPU."""

import functools
import os

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "true")  # TRL sends no telemetry then

SENTENCES = [
    "You read a file with the Read tool and edit it with the Edit tool.",
    "The string to replace was not found in the file; read the file first.",
    "count the letters in the word and answer with one number",
    '<tool_call>\n{"name": "Read", "arguments": {"file_path": "a.py"}}\n</tool_call>',
    "0 1 2 3 4 5 6 7 8 9 + - = a b c d e f g h i j k l m n o p q r s t u v w x y z",
]


def build_tokenizer():
    """A small byte-level BPE with the ChatML tool template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from composer_plugins.models.toolcalls import install_tool_template

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    tokenizer.padding_side = "left"
    return install_tool_template(tokenizer)


def build_model(tokenizer, *, seed: int = 0, **options):
    """A tiny Llama with random weights, the same for the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options}))


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_model(tokenizer):
    """Build the same tiny Llama every time it is called."""
    return functools.partial(build_model, tokenizer)


@pytest.fixture
def dataset():
    from datasets import Dataset

    rows = [
        {"prompt": [{"role": "user", "content": f"count the letters in {word}"}], "hint": f"the answer is {len(word)}"}
        for word in ("a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh")
    ]
    return Dataset.from_list(rows)


def letters_reward(completion_ids, **_):
    """A spread of rewards from whatever a random model says."""
    return [(sum(ids) % 13) / 13 for ids in completion_ids]


@pytest.fixture
def make_trainer(make_model, tokenizer, dataset, tmp_path):
    """Build a ComposerGRPOTrainer on the tiny model; `composer` is the section, other names go to the config."""

    def make(
        composer=None, *, model=None, reward_funcs=letters_reward, trainer_kwargs=None, train_dataset=None, **args
    ):
        from composer_trl import ComposerGRPOConfig, ComposerGRPOTrainer

        settings = dict(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
            max_steps=2, learning_rate=1e-3, report_to="none", save_strategy="no", logging_steps=1, use_cpu=True,
            bf16=False, disable_tqdm=True, gradient_checkpointing=False, seed=7,
        )  # fmt: skip
        return ComposerGRPOTrainer(
            model if model is not None else make_model(),
            reward_funcs=reward_funcs,
            args=ComposerGRPOConfig(**{**settings, **args}, composer=composer),
            train_dataset=train_dataset if train_dataset is not None else dataset,
            processing_class=tokenizer,
            **(trainer_kwargs or {}),
        )

    return make
