"""Local stand-ins for the tiny models and small datasets that TRL's own tests load from the model hub.

`build_hub(folder)` lays out a hub cache (`models--org--name/snapshots/<revision>`), so that
`HF_HUB_OFFLINE=1 HF_HUB_CACHE=folder` makes `from_pretrained("trl-internal-testing/...")` work unpatched.
Weights are random, tokenizers are trained here, texts come from `import this`: nothing is downloaded. The
architectures and sizes follow TRL's scripts/generate_tiny_models; the chat templates are those of the
installed TRL, because TRL recognises a model family by the exact text of its template.
"""

from __future__ import annotations

import codecs
import json
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

ORGANIZATION = "trl-internal-testing"
REVISION = "0" * 40
_SIZES = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
_SIZES["intermediate_size"] = 32

# Ids of Qwen's tokenizer that TRL's tests write down as completions. Spaces stand for themselves here.
_QWEN_TEXT = {
    314: " {", 330: ' "', 397: ">\n", 411: "out", 450: "dec", 497: '",', 522: "</", 606: "name", 788: '":',
    894: " any", 927: "sh", 944: "'t", 1318: "text", 1414: " know", 1513: " don", 2765: " won", 4913: '{"',
    5212: ' {"', 5392: " tool", 6023: "hi", 6659: "call", 7692: "async", 9520: "step", 11248: "}}\n",
    13477: "rement", 14172: "tool", 16252: " increment", 16370: "arguments", 17453: "Done", 22785: "_tool",
    35744: "increment", 64648: "multiply", 93054: "_multiply", 95642: '"}}\n', 293: " b",
}  # fmt: skip
_QWEN_SPECIAL = {
    151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151657: "<tool_call>",
    151658: "</tool_call>", 151665: "<tool_response>", 151666: "</tool_response>", 151667: "<think>",
    151668: "</think>",
}  # fmt: skip
#: Entries of the stand-in for Qwen's vocabulary (the original: 151,669, which on tiny models is nearly all of
#: the time). Larger ids that tests write down move to its end.
QWEN_SIZE = 8192
_MOVED = [i for i in (*sorted(_QWEN_TEXT), *_QWEN_SPECIAL) if i >= QWEN_SIZE - 64]
MOVED_IDS = dict(zip(_MOVED, range(QWEN_SIZE - len(_MOVED), QWEN_SIZE), strict=True))


def move_ids(code: str) -> str:
    """Rewrite, in the text of a test module, the token ids of Qwen that lie elsewhere in the stand-in.

    >>> move_ids("[198, 4913, 151645]  # eos")
    '[198, 4913, 8185]  # eos'
    """
    ids = "|".join(map(str, MOVED_IDS))
    return re.sub(rf"\b({ids})\b", lambda found: str(MOVED_IDS[int(found[0])]), code)


#: Markers that stay in decoded text, as in the original tokenizers: parsers look for them.
_VISIBLE = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer family: its template file in TRL, its special tokens and where their ids lie."""

    template: str | None
    eos: str
    pad: str
    bos: str | None = None
    special: tuple[str, ...] = ()
    size: int = 2048
    fixed: dict[int, str] = field(default_factory=dict)
    fixed_special: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A model: transformers class, tokenizer family and config values beyond the common tiny sizes."""

    architecture: str
    tokenizer: str
    config: dict[str, Any] = field(default_factory=dict)


def _qwen(template: str) -> Tokenizer:
    return Tokenizer(
        template,
        "<|im_end|>",
        "<|endoftext|>",
        size=QWEN_SIZE,
        fixed={MOVED_IDS.get(i, i): text for i, text in _QWEN_TEXT.items()},
        fixed_special={MOVED_IDS[i]: text for i, text in _QWEN_SPECIAL.items()},
    )


_GLM_MARKS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_COHERE_MARKS = (
    "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>",
)  # fmt: skip
_GPT_OSS_MARKS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")
_NEMOTRON_MARKS = ("<|im_start|>", *_VISIBLE)
_LLAMA_MARKS = ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>")
TOKENIZERS = {
    "qwen2.5": _qwen("qwen2_5"),
    "qwen3": _qwen("qwen3"),
    "llama3.2": Tokenizer(
        "llama3_2", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|begin_of_text|>", special=_LLAMA_MARKS
    ),
    "mistral": Tokenizer(None, "</s>", "<unk>", "<s>", special=("[INST]", "[/INST]")),
    "gemma": Tokenizer("gemma", "<eos>", "<pad>", "<bos>", special=("<start_of_turn>", "<end_of_turn>")),
    "cohere2": Tokenizer("cohere2", "<|END_OF_TURN_TOKEN|>", "<PAD>", "<BOS_TOKEN>", special=_COHERE_MARKS),
    "glm4": Tokenizer("glm4moe", "<|endoftext|>", "<|endoftext|>", special=(*_GLM_MARKS, *_VISIBLE)),
    "gptoss": Tokenizer("gptoss", "<|return|>", "<|endoftext|>", special=_GPT_OSS_MARKS),
    "nemotron": Tokenizer("nemotron_3_nano", "<|im_end|>", "<unk>", "<s>", special=("<|im_start|>", *_VISIBLE)),
}

_GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 128, "norm_topk_prob": True}
_GLM_MOE = {
    "moe_intermediate_size": 32, "head_dim": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "attention_bias": True, "routed_scaling_factor": 2.5, "use_qk_norm": True,
}  # fmt: skip
_NEMOTRON = {
    "hidden_size": 16, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8,
    "mamba_head_dim": 4, "mamba_n_groups": 1, "ssm_state_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "use_mamba_kernels": False,
}  # fmt: skip
_REWARD = {"num_labels": 1, "hidden_size": 16}
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": Model("Qwen2ForCausalLM", "qwen2.5"),
    "tiny-Qwen3ForCausalLM": Model("Qwen3ForCausalLM", "qwen3"),
    "tiny-Qwen3MoeForCausalLM": Model("Qwen3MoeForCausalLM", "qwen3", _QWEN3_MOE),
    "tiny-LlamaForCausalLM-3.2": Model("LlamaForCausalLM", "llama3.2"),
    "tiny-MistralForCausalLM-0.2": Model("MistralForCausalLM", "mistral"),
    "tiny-Gemma2ForCausalLM": Model("Gemma2ForCausalLM", "gemma", {"head_dim": 8}),
    "tiny-Cohere2ForCausalLM": Model("Cohere2ForCausalLM", "cohere2", {"logit_scale": 1.0}),
    "tiny-Glm4MoeForCausalLM": Model("Glm4MoeForCausalLM", "glm4", _GLM_MOE),
    "tiny-GptOssForCausalLM": Model("GptOssForCausalLM", "gptoss", _GPT_OSS),
    "tiny-NemotronHForCausalLM-nano": Model("NemotronHForCausalLM", "nemotron", _NEMOTRON),
    "tiny-Qwen2ForSequenceClassification-2.5": Model("Qwen2ForSequenceClassification", "qwen2.5", _REWARD),
    "tiny-Qwen3ForSequenceClassification": Model("Qwen3ForSequenceClassification", "qwen3", _REWARD),
    "tiny-LlamaForSequenceClassification-3.2": Model("LlamaForSequenceClassification", "llama3.2", _REWARD),
}
REMOTE = "tiny-RemoteForCausalLM"
_REMOTE_CODE = {
    "configuration_remote.py": """from transformers import LlamaConfig


class RemoteConfig(LlamaConfig):
    model_type = "remote"
""",
    "modeling_remote.py": """from transformers import LlamaForCausalLM

from .configuration_remote import RemoteConfig


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
""",
}


def zen() -> list[str]:
    """Return the aphorisms of the Zen of Python in order."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        import this
    lines = codecs.decode(this.s, "rot13").splitlines()[2:]
    return [line.strip().rstrip(".!") for line in lines if line.strip()]


# How many words of each aphorism TRL's `zen` prompts keep, where a test writes the prompt down; else 3.
_PROMPT_WORDS = (4, 2, 3, 1, 4, 3, 1, 4, 3, 3, 2, 6)


def zen_prompts() -> list[str]:
    """Return the prompts of the `standard_prompt_only` configuration: 19 unfinished aphorisms.

    >>> zen_prompts()[:2]
    ['Beautiful is better than', 'Explicit is']
    """
    words = dict(enumerate(_PROMPT_WORDS))
    return [" ".join(line.split()[: words.get(i, 3)]) for i, line in enumerate(zen())]


def load_dataset(path: str, name: str | None = None, split: str | None = None, streaming: bool = False, **_: Any):
    """Stand-in for `datasets.load_dataset` on `trl-internal-testing/zen`, smaller than the original.

    17 train rows become 12 (one test writes the first 12 down), 5 in the conversational configuration (the
    tool tests use it); 2 test rows as in the original.

    Raises:
        ValueError: another dataset or configuration (a test that needs it cannot run here).
    """
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    prompts: list[Any] = zen_prompts()
    rows = 12
    if path != f"{ORGANIZATION}/zen" or name not in ("standard_prompt_only", "conversational_prompt_only"):
        raise ValueError(f"No local stand-in for the dataset {path!r}, configuration {name!r}.")
    if name == "conversational_prompt_only":
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        rows = 5
    parts = {
        "train": Dataset.from_dict({"prompt": prompts[:rows]}),
        "test": Dataset.from_dict({"prompt": prompts[-2:]}),
    }
    if streaming:
        streams = IterableDatasetDict({key: part.to_iterable_dataset() for key, part in parts.items()})
        return streams if split is None else streams[split]
    return DatasetDict(parts) if split is None else parts[split]


# Tokenizers


def _fillers(taken: set[str]) -> Iterable[str]:
    """Yield pseudo-words that no merge produces, so a random model's samples decode to distinct text."""
    for letters in product(string.ascii_lowercase, repeat=4):
        word = "Ġ" + "".join(letters)
        if word not in taken:
            yield word


def _vocabulary(family: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (token to id, merges): bytes at GPT-2's ids, fixed ids, trained merges, specials, fillers."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    sample = '<tool_call> {"name": "tool", "arguments": {}} I am a helpful assistant'
    backend.train_from_iterator([*zen(), sample], trainer)
    trained = json.loads(backend.to_str())["model"]

    encode = dict(zip(" \n", "ĠĊ", strict=True))
    by_id = dict(enumerate(sorted(alphabet)))  # code point order is GPT-2's and Qwen's order of the bytes
    by_id |= {i: "".join(encode.get(c, c) for c in text) for i, text in family.fixed.items()}
    by_id |= family.fixed_special
    special = [t for t in dict.fromkeys([family.pad, family.eos, family.bos, *family.special]) if t]
    taken = set(by_id.values())
    free = (i for i in range(family.size) if i not in by_id)
    learned = [token for token in trained["vocab"] if token not in taken]
    by_id |= dict(zip(free, [*[t for t in special if t not in taken], *learned], strict=False))
    taken = set(by_id.values())
    holes = [i for i in range(family.size) if i not in by_id]
    by_id |= dict(zip(holes, islice(_fillers(taken), len(holes)), strict=True))
    return {token: i for i, token in sorted(by_id.items())}, [tuple(pair) for pair in trained["merges"]]


def tokenizer(name: str):
    """Build a tokenizer of `TOKENIZERS`, with the installed TRL's chat template for its family."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    family = TOKENIZERS[name]
    vocabulary, merges = _vocabulary(family)
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = [*family.fixed_special.values(), family.pad, family.eos, family.bos, *family.special]
    for mark in dict.fromkeys(m for m in marks if m):
        # the id is the one in the vocabulary; being "added" keeps the mark in one piece
        backend.add_tokens([AddedToken(mark, special=mark not in _VISIBLE, normalized=False)])
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=family.eos, pad_token=family.pad, bos_token=family.bos
    )
    result.chat_template = _template(family.template)
    return result


def _template(name: str | None) -> str:
    if name is None:
        return "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


# Models


def _initialise(model) -> None:
    """Xavier for matrices and N(0, 0.02) for embeddings, as TRL's scripts do; biases 0."""
    import torch
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for parameter in model.parameters():  # experts and mixers that are bare parameters
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{type(model).__name__} has uninitialised parameters.")


def tiny_model(name: str, tokens, *, seed: int = 0):
    """Build a model of `MODELS` with random bf16 weights for the tokenizer `tokens`."""
    import torch
    import transformers

    spec = MODELS[name]
    architecture = getattr(transformers, spec.architecture)
    values = {**_SIZES, **spec.config}
    if "layers_block_type" in values:
        del values["num_hidden_layers"]  # the list of blocks says it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = architecture.config_class(vocab_size=len(tokens), **_special_ids(tokens), **values)
        model = architecture(config).to(torch.bfloat16)
        _initialise(model)
    return model


def _special_ids(tokens) -> dict[str, int | None]:
    return {f"{n}_token_id": getattr(tokens, f"{n}_token_id") for n in ("bos", "eos", "pad")}


def save(name: str, folder: Path, tokenizers: Callable[[str], Any] = tokenizer) -> None:
    """Write model and tokenizer `name` into `folder`, as `save_pretrained` does."""
    if name == REMOTE:
        _save_remote(folder, tokenizers("llama3.2"))
        return
    tokens = tokenizers(MODELS[name].tokenizer)
    model = tiny_model(name, tokens)
    tokens.save_pretrained(folder)
    model.save_pretrained(folder)


def _save_remote(folder: Path, tokens) -> None:
    """A model whose class lives beside its weights (`trust_remote_code`)."""
    save("tiny-LlamaForCausalLM-3.2", folder, lambda _: tokens)
    for file, code in _REMOTE_CODE.items():
        (folder / file).write_text(code)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(model_type="remote", architectures=["RemoteForCausalLM"])
    config["auto_map"] = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    path.write_text(json.dumps(config, indent=2))


def build_hub(folder: Path, names: Iterable[str] = (*MODELS, REMOTE)) -> Path:
    """Lay out a hub cache with the named models under `folder` and return it; existing ones are kept."""
    from functools import cache

    shared = cache(tokenizer)
    for name in names:
        root = Path(folder) / f"models--{ORGANIZATION}--{name}"
        if (root / "refs" / "main").exists():
            continue
        snapshot = root / "snapshots" / REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        save(name, snapshot, shared)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(REVISION)  # last: a half-built model is not taken for whole
    return Path(folder)
