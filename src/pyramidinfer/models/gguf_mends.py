"""Differences between a GGUF file and what transformers reads from it: corrected or refused.

transformers reads a fixed list of keys from a file and ignores the rest, so a model may load with
the wrong settings.  All keys of a file must be known here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from pyramidinfer.models.gguf_file import Header

__all__ = ["mend_config", "mend_ends", "mend_tokenizer"]

#: Keys that transformers reads into the config, or that have no effect.
READ = {
    "context_length",
    "block_count",
    "feed_forward_length",
    "embedding_length",
    "vocab_size",
    "rope.freq_base",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "tensor_data_layout",
    "attention.layer_norm_epsilon",
}
#: Keys that are handled here.
MENDED = {
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base_swa",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scale_linear",
    "rope.scaling.finetuned",
}
GEMMA = ("gemma2", "gemma3")
#: Depth of models that scale queries by hidden / heads instead of the head's size.
LARGEST = {"gemma2": 46, "gemma3": 62}
#: Byte-level vocabularies that split off single digits first.
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
#: Byte-level vocabularies with GPT-2's split, the default of transformers for unknown names.
PLAIN = {"gpt-2", "default", "mpt", "olmo", "jais", "phi-2", "granite-docling", "trillion"}
#: End-of-turn tokens of instruct models; used if the file's chat template writes them.
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>")


def mend_config(header: Header, config: Any) -> None:
    """Correct a config that transformers read, according to the file, in place."""
    prefix = header.architecture + "."
    for name, value in header.metadata.items():
        key = name.removeprefix(prefix)
        if name.startswith(prefix) and key not in READ | MENDED and value not in (0, False, ""):
            raise _refused(header, f"it says {name}={value!r}, which is not supported")
    _mend_heads(header, config)
    _mend_windows(header, config)
    if header.architecture in GEMMA:
        _mend_gemma(header, config)
    _mend_rotation(header, config)


def mend_ends(header: Header, tokenizer: Any, first: Any) -> Any:
    """The end-of-sequence ids: those of transformers, and the end-of-turn tokens that it ignores.

    Without them, an instruct model whose turns end with a different token than texts would not
    stop.
    """
    ends = [first] if isinstance(first, int) else list(first or ())
    named = (header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))
    ends += [end for end in named if end is not None]
    template = header.metadata.get("tokenizer.chat_template", "")
    known = tokenizer.get_vocab()
    ends += [known[mark] for mark in TURN_ENDS if mark in template and mark in known]
    ends = list(dict.fromkeys(ends))
    return ends if len(ends) > 1 else first


def mend_tokenizer(header: Header, tokenizer: Any) -> None:
    """Set the text split of the file's vocabulary.

    transformers knows most names in ``tokenizer.ggml.pre`` and uses GPT-2's split for the others;
    for SmolLM this separates repeated line feeds or blanks before a digit.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    if pre in DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif pre not in PLAIN and pre not in GGUF_PRE_TOKENIZER_SPLITS:
        raise _refused(header, f"its text split, {pre!r}, is not supported")


def _refused(header: Header, reason: str) -> ValueError:
    return ValueError(
        f"{str(header.file)!r} cannot be converted: {reason}; use the model's safetensors instead"
    )


def _mend_heads(header: Header, config: Any) -> None:
    """The size of a head; transformers reads it from the file for some families only."""
    head, value = header.get("attention.key_length"), header.get("attention.value_length")
    if head is not None and hasattr(config, "head_dim"):
        config.head_dim = head
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if value not in (None, size) or head not in (None, size):
        raise _refused(header, f"its keys have {head} numbers a head, its values {value}")
    if (rotated := header.get("rope.dimension_count")) not in (None, size):
        raise _refused(header, f"{rotated} of {size} numbers of a head are rotated")


def _mend_windows(header: Header, config: Any) -> None:
    """Sliding windows: the size, and which layers have one."""
    window = header.get("attention.sliding_window")
    pattern = header.get("attention.sliding_window_pattern")
    if window and header.architecture not in GEMMA:
        if config.model_type not in ("mistral", "phi3"):
            raise _refused(header, f"it has a sliding window of {window}")
        config.sliding_window = window
    if not pattern:
        return
    if header.architecture not in GEMMA:
        raise _refused(header, f"only some layers have its sliding window ({pattern})")
    depth = config.num_hidden_layers
    slides = pattern if isinstance(pattern, list) else [(i + 1) % pattern for i in range(depth)]
    config.layer_types = ["sliding_attention" if each else "full_attention" for each in slides]


def _mend_gemma(header: Header, config: Any) -> None:
    """Soft caps of scores and logits, and the scale of queries, which is in no file."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := header.get(key)) is not None:
            setattr(config, key, cap or None)
    scale = config.head_dim
    if config.num_hidden_layers == LARGEST[header.architecture]:
        scale = config.hidden_size // config.num_attention_heads
    config.query_pre_attn_scalar = scale


def _mend_rotation(header: Header, config: Any) -> None:
    """Scaled rotary positions, which transformers ignores."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)  # Gemma 3 scales only layers without a window
    if (local := header.get("rope.freq_base_swa")) is not None:
        config.rope_parameters["sliding_attention"]["rope_theta"] = local
    factor = header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 1.0
    kind = header.get("rope.scaling.type") or "linear"
    if any(name.startswith("rope_factors") for name in header.tensors):
        raise _refused(header, "its rotary positions are stretched by factors of their own")
    if kind == "yarn" and factor != 1:
        rope.update(
            rope_type="yarn",
            factor=factor,
            original_max_position_embeddings=header.get("rope.scaling.original_context_length"),
        )
    elif kind == "linear" and factor != 1:
        rope.update(rope_type="linear", factor=factor)
    elif kind not in ("none", "linear", "yarn"):
        raise _refused(header, f"its rotary scaling {kind!r} is not supported")
    if "rope_freqs.weight" in header.tensors:
        _mend_llama3(header, rope, config)


def _mend_llama3(header: Header, rope: dict[str, Any], config: Any) -> None:
    """Llama 3.1's rotary scaling: the file holds the divisor of each frequency, a config the
    rule."""
    found = header.floats("rope_freqs.weight")
    if np.allclose(found, 1):
        return
    factor, low, high, original = float(found.max()), 1.0, 4.0, 8192
    size = config.head_dim
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    if len(found) != size // 2 or not np.allclose(
        found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
    ):
        raise _refused(header, "its rotary positions are stretched by factors of their own")
    rope.update(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
