"""Where transformers' reading of a GGUF and the file itself differ: mended, or refused.

transformers takes a fixed list of keys from a file and passes over the rest, so a model may load
and be another one.  Everything a file says must be understood here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from pyramidinfer.models.gguf_file import Header

__all__ = ["mend_config", "mend_ends", "mend_tokenizer"]

#: Keys that transformers reads into the config, or that nothing hangs on.
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
#: Keys that are taken in here.
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
#: Depth of the models whose queries are scaled by hidden / heads and not by the head's size.
LARGEST = {"gemma2": 46, "gemma3": 62}
#: Byte-level vocabularies whose digits stand alone before anything else is split.
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
#: Byte-level vocabularies split as GPT-2's, which is what transformers does with a name it lacks.
PLAIN = {"gpt-2", "default", "mpt", "olmo", "jais", "phi-2", "granite-docling", "trillion"}
#: How instruct models end a turn; an end where the file's chat template writes it.
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>")


def mend_config(header: Header, config: Any) -> None:
    """Bring a config that transformers read in line with the file, in place."""
    prefix = header.architecture + "."
    for name, value in header.metadata.items():
        key = name.removeprefix(prefix)
        if name.startswith(prefix) and key not in READ | MENDED and value not in (0, False, ""):
            raise _refused(header, f"it says {name}={value!r}, which is not understood here")
    _mend_heads(header, config)
    _mend_windows(header, config)
    if header.architecture in GEMMA:
        _mend_gemma(header, config)
    _mend_rotation(header, config)


def mend_ends(header: Header, tokenizer: Any, first: Any) -> Any:
    """The end-of-sequence ids: what transformers found, and the ends of a turn that it passes over.

    An instruct model whose turn ends with another token than its texts would not stop.
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
    """Split text as the file's vocabulary wants it.

    transformers knows most names in ``tokenizer.ggml.pre`` and takes GPT-2's way for the others;
    for SmolLM's that parts a line feed or blank from its like before a digit.
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
        raise _refused(header, f"its way of splitting text, {pre!r}, is not known here")


def _refused(header: Header, reason: str) -> ValueError:
    return ValueError(
        f"{str(header.file)!r} cannot be converted: {reason}; use the model's safetensors instead"
    )


def _mend_heads(header: Header, config: Any) -> None:
    """The size of a head; transformers takes it from the file for some families only."""
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
    """Caps on scores and logits, and what queries are scaled by, which no file says."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := header.get(key)) is not None:
            setattr(config, key, cap or None)
    scale = config.head_dim
    if config.num_hidden_layers == LARGEST[header.architecture]:
        scale = config.hidden_size // config.num_attention_heads
    config.query_pre_attn_scalar = scale


def _mend_rotation(header: Header, config: Any) -> None:
    """Stretched rotary positions, all of which transformers passes over."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)  # Gemma 3 stretches its layers without a window only
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
        raise _refused(header, f"its rotary positions are stretched in another way, {kind!r}")
    if "rope_freqs.weight" in header.tensors:
        _mend_llama3(header, rope, config)


def _mend_llama3(header: Header, rope: dict[str, Any], config: Any) -> None:
    """Llama 3.1's stretching: the file holds the divisor of each frequency, a config its rule."""
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
