"""Measurements of the shipped model: recall, perplexity, and where pruning costs nothing.

``python -m pyramidinfer.lab.model_report`` writes ``benchmarks/results/demo_model.json`` and the
pictures of ``docs/images``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pyramidinfer.engine import LLM
from pyramidinfer.lab import documents
from pyramidinfer.lab.plots import draw_curve, draw_training
from pyramidinfer.lab.recall import ANSWER, is_right, make_questions
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.train import LOG
from pyramidinfer.models.loading import quiet_transformers, shipped_model
from pyramidinfer.policies import Full, Policy, PyramidInfer

__all__ = ["filler_perplexity", "recall", "report"]

#: Seed of the report's documents; training and the demo use other seeds.
SEED = 77


def recall(model: str, policy: Policy, length: int, count: int) -> dict[str, Any]:
    """Share of questions answered word for word, and the shares that the policy computed and
    kept."""
    questions = make_questions(SEED, count, length)
    llm = LLM(model, policy, kv_memory="256MiB", dtype="float32")
    outputs = llm.generate([question.prompt for question in questions], ANSWER)
    right = sum(is_right(o, q) for o, q in zip(outputs, questions, strict=True))
    return {
        "length": length,
        "questions": count,
        "recall": right / count,
        "computed_share": sum(o.metrics.computed_share for o in outputs) / count,
        "kept_share": sum(o.kv.kept_share for o in outputs) / count,
    }


def one_drop(layer: int, depth: int, share: float) -> PyramidInfer:
    """All tokens up to ``layer``, after it ``share`` of them; no further drop."""
    return PyramidInfer(
        start_layer=layer,
        interval=depth,
        decay_curve="constant",
        prefill_decay=share * 0.8,
        recent_ratio=share * 0.2,
        min_context=1,
    )


def filler_perplexity(model: str, count: int = 20, length: int = 1000) -> dict[str, float]:
    """Perplexity of filler sentences."""
    rng = random.Random(f"filler {SEED}")
    ids = {word: index for index, word in enumerate(documents.vocabulary())}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = []
    for _ in range(count):
        words = ["<bos>", "<user>", *documents.document(rng, length, 0).words]
        rows.append([ids[word] for word in words])
    batch = torch.tensor(rows)
    with torch.inference_mode():
        losses = [F.cross_entropy(loaded(row[None]).logits[0, 1:-1], row[2:]) for row in batch]
    return {"perplexity": math.exp(float(torch.stack(losses).mean())), "tokens": count * length}


def report(model: str, out: Path, images: Path, count: int) -> None:
    """Measure everything and write the result."""
    log = [json.loads(line) for line in (Path(model) / LOG).read_text().splitlines()]
    depth = log[0]["recipe"]["layers"]
    result: dict[str, Any] = {}
    with Progress() as bar:
        task = bar.add_task("measuring", total=3 + depth - 1)
        for length in (1000, 3000):
            result[f"full_{length}"] = recall(model, Full(), length, count)
            bar.advance(task)
        result["filler"] = filler_perplexity(model)
        bar.advance(task)
        curve = []
        for layer in range(depth - 1):
            found = recall(model, one_drop(layer, depth, 0.1), 1000, count // 2)
            curve.append({"first_pruned_layer": layer + 1, **found})
            bar.advance(task)
    result["curve"] = curve
    result["training"] = {"tokens": log[-1]["tokens"], "seconds": log[-1]["seconds"]}
    write_result(out, {"seed": SEED, "count": count, "recipe": log[0]["recipe"]}, result)
    draw_curve(
        [(row["first_pruned_layer"], row["recall"]) for row in curve],
        images / "first_pruned_layer.png",
        title="Keeping 10 % of the tokens from one layer on (1,000-token documents)",
        xlabel="first pruned layer",
        ylabel="exact recall",
        level=result["full_1000"]["recall"],
        level_name="full cache",
    )
    draw_training([row for row in log if "stage" in row], images / "training.png")
    print(json.dumps({key: value for key, value in result.items() if key != "curve"}, indent=1))
    for row in curve:
        print(row["first_pruned_layer"], row["recall"], round(row["computed_share"], 3))


def main() -> None:
    parser = argparse.ArgumentParser(description="What the shipped model can do.")
    parser.add_argument("--model", default=shipped_model())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo_model.json"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    quiet_transformers()
    report(arguments.model, arguments.out, arguments.images, arguments.count)


if __name__ == "__main__":
    main()
