"""A tiny Llama with a tokenizer, a prompt set and a reward, made here: no hub, no download."""

from pathlib import Path

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "say", "a", "color", "number", "please", "the"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def write_model(folder: Path) -> Path:
    """Save the model and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
            pad_token_id=0, eos_token_id=vocabulary["<|im_end|>"], bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_byte_model(folder: Path) -> Path:
    """Save a model that reads any text, a token per byte, with the chat template of ours that renders tools."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from composer_plugins.models.toolcalls import install_tool_template

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytewise = Tokenizer(models.BPE(vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
            pad_token_id=0, eos_token_id=2, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    install_tool_template(tokenizer).save_pretrained(folder)
    return folder


def write_data(path: Path, rows: int = 32) -> Path:
    """Save prompts as verl's parquet."""
    import pandas as pd

    prompt = [[{"role": "user", "content": f"say {WORDS[i % 8]} please"}] for i in range(rows)]
    pd.DataFrame(
        {
            "prompt": prompt,
            "data_source": "tiny",
            "reward_model": [{"style": "rule", "ground_truth": WORDS[i % 8]} for i in range(rows)],
            "extra_info": [{"index": i} for i in range(rows)],
        }
    ).to_parquet(path)
    return path


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """Share of the answer's words that are a color: random answers differ in it, so groups have a spread."""
    words = solution_str.split()
    return sum(word in ("red", "green", "blue") for word in words) / max(len(words), 1)


def compute_score_with_feedback(data_source, solution_str, ground_truth, extra_info=None, **_):
    """`compute_score`, and in words what was wrong with an answer that is not all colors."""
    score = compute_score(data_source, solution_str, ground_truth, extra_info)
    said = "" if score == 1 else f"please say a color not the number two {ground_truth}"
    return {"score": score, "feedback": said}
