"""llama.cpp: all sequences in one batch, through its low-level interface.

The GGUF file is written in float16 from the model's tensors; llama.cpp's own quantizer makes the
others of it.  A K type needs rows of a multiple of 256: the quantizer stores other tensors in the
nearest type that fits, and the driver tells which types the file has.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lib
import numpy as np
from driver import Answers, Engine, drive

BATCH = 2048


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All weights of a safetensors checkpoint as float32."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        size = int(raw[:8].view(np.uint64)[0])
        head = json.loads(bytes(raw[8 : 8 + size]))
        for name, entry in head.items():
            if name == "__metadata__":
                continue
            first, last = (8 + size + at for at in entry["data_offsets"])
            data = np.array(raw[first:last])
            if entry["dtype"] == "BF16":
                wide = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                wide = data.view({"F16": np.float16, "F32": np.float32}[entry["dtype"]])
            found[name] = wide.astype(np.float32).reshape(entry["shape"])
    return found


def per_head(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order llama.cpp turns them."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def write(folder: Path, target: Path) -> None:
    """Write a Llama or Qwen2 checkpoint as GGUF: matrices float16, the rest float32, no
    vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    if family not in ("llama", "qwen2"):
        raise ValueError(f"the driver cannot write a GGUF file of a {family} model")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    out = gguf.GGUFWriter(str(target), family)
    out.add_vocab_size(config["vocab_size"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    out.add_tokenizer_model("no_vocab")
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[family]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, weight in tensors(folder).items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue  # the embedding is the head
        if family == "llama" and name.endswith("q_proj.weight"):
            weight = per_head(weight, heads)
        elif family == "llama" and name.endswith("k_proj.weight"):
            weight = per_head(weight, kv_heads)
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        out.add_tensor(known, weight.astype(np.float16) if weight.ndim > 1 else weight)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def convert(job: dict[str, Any]) -> Path:
    """The GGUF file of a type, made once."""
    kind = job["options"]["type"]
    target = Path(job["work"]) / f"model-{kind}.gguf"
    if target.is_file():
        return target
    half = target.with_suffix(".part")
    if kind == "F16":
        write(Path(job["model"]), half)
    else:
        whole = convert({**job, "options": {"type": "F16"}})
        settings = lib.llama_model_quantize_default_params()
        settings.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
        settings.nthread = job["threads"]
        if lib.llama_model_quantize(str(whole).encode(), str(half).encode(), settings):
            raise RuntimeError(f"llama.cpp cannot quantize the model to {kind}")
    half.rename(target)
    return target


def described(target: Path) -> dict[str, Any]:
    """The file's weights: bytes, bits each, and how many matrices have which type."""
    matrices = [each for each in gguf.GGUFReader(target).tensors if len(each.shape) > 1]
    size = sum(int(each.n_bytes) for each in matrices)
    return {
        "weight_bytes": size,
        "bits_per_weight": 8 * size / sum(int(each.n_elements) for each in matrices),
        "types": dict(Counter(each.tensor_type.name for each in matrices)),
    }


def load(job: dict[str, Any]) -> Engine:
    target = convert(job)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(target).encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp cannot load the converted model")
    most = len(job["prompts"])
    longest = max(len(prompt) for prompt in job["prompts"]) + job["max_new"]
    settings = lib.llama_context_default_params()
    settings.n_seq_max = most
    settings.n_ctx = most * (-(-longest // 256) * 256)
    settings.n_batch = BATCH
    settings.n_threads = settings.n_threads_batch = job["threads"]
    settings.flash_attn_type = 1  # on
    kind = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0}[job["options"]["cache"]]
    settings.type_k = settings.type_v = kind
    context = lib.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(BATCH, 0, 1)

    def put(token: int, position: int, sequence: int, wanted: bool) -> None:
        at = batch.n_tokens
        batch.token[at], batch.pos[at] = token, position
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        batch.logits[at] = wanted
        batch.n_tokens = at + 1

    def run() -> dict[int, int]:
        """Decode what is in the batch; the likeliest token of each row that asked for logits."""
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        found = {}
        for at in range(batch.n_tokens):
            if batch.logits[at]:
                row = lib.llama_get_logits_ith(context, at)
                logits = np.ctypeslib.as_array(row, shape=(vocabulary,))
                found[batch.seq_id[at][0]] = int(logits.argmax())
        batch.n_tokens = 0
        return found

    def generate(prompts: list[list[int]], max_new: int) -> Answers:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        start = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in prompts]
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                put(token, position, sequence, position == len(prompt) - 1)
                if batch.n_tokens == BATCH:
                    for which, best in run().items():
                        tokens[which].append(best)
        if batch.n_tokens:
            for which, best in run().items():
                tokens[which].append(best)
        first = time.perf_counter() - start
        for step in range(max_new - 1):
            for sequence, prompt in enumerate(prompts):
                put(tokens[sequence][-1], len(prompt) + step, sequence, True)
            for which, best in run().items():
                tokens[which].append(best)
        return Answers(tokens, first)

    return Engine(generate, ["llama-cpp-python", "gguf"], described(target))


if __name__ == "__main__":
    drive(load, convert)
