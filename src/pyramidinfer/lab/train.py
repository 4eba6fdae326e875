"""Train the model shipped in the repository, from generated text alone.

``python -m pyramidinfer.lab.train --out DIR`` makes the same model again (up to float rounding).

Stages: pure copying (a random sequence repeated to fill the window), restating facts in shuffled
order, recall of facts among filler with the length growing 1.5x whenever recall passes a bar, and
a finish at the full context with the learning rate falling to zero.  Only the first
``base_layers`` are trained until the finish; the others start as the identity and join there.
The final norm and head are also applied after the *exit* layers (as in LayerSkip,
arXiv 2404.16710).  Both make deep layers redundant: what a large model has by itself (the
paper's inference context redundancy) and a tiny one, trained plainly, lacks.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pyramidinfer.lab import documents
from pyramidinfer.lab.tokenizer import build_tokenizer

__all__ = ["Recipe", "train"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides what the trained model is."""

    width: int = 128
    layers: int = 12
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 256
    context: int = 4096
    base_layers: int = 5
    exits: tuple[int, ...] = (4, 5, 6, 8, 10)
    exit_weight: float = 0.5
    filler_weight: float = 0.1
    filler_sample: float = 0.2
    step_tokens: int = 2048
    start_length: int = 64
    pair_length: int = 96
    growth: float = 1.5
    advance_at: float = 0.93
    max_stage_tokens: int = 8_000_000
    finish_tokens: int = 4_000_000
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    init_std: float = 0.05
    seed: int = 1


class Example(NamedTuple):
    """Token ids and the weight of predicting each of them; ``keys`` marks what must be recalled."""

    ids: list[int]
    weights: list[float]
    keys: list[bool]


class Sampler:
    """Makes training sequences; every call is a new document."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.rng = random.Random(seed)
        self.ids = {word: index for index, word in enumerate(documents.vocabulary())}
        self.content = [i for w, i in self.ids.items() if w not in documents.SPECIALS]

    def copying(self, length: int) -> Example:
        """A random sequence of period 4 to 16 repeated to ``length``; repeats are to be recalled."""
        period = self.rng.randint(4, 16)
        cycle = self.rng.choices(self.content, k=period)
        ids = [self.ids["<bos>"], *(cycle * (length // period + 1))][:length]
        keys = [index > period for index in range(length)]
        return Example(ids, [1.0 if key else 0.0 for key in keys], keys)

    def pairs(self, length: int) -> Example:
        """A few facts, then the same facts again and again in random order.

        How many words stand between the name and what is to be recalled differs from sequence
        to sequence: none, up to the whole sentence.
        """
        rng, recipe = self.rng, self.recipe
        facts = documents.sample_facts(rng, rng.randint(2, 6))
        gap = rng.randrange(5)
        words, weights, keys = ["<bos>"], [0.0], [False]
        again = [*facts, *rng.choices(facts, k=length // 2)]
        for index, fact in enumerate(again):
            sentence = fact.words() if gap == 4 else [
                fact.last, *["is", "in", fact.place][3 - gap :], fact.number
            ]  # fmt: skip
            recalled = [
                index >= len(facts) and word in (fact.place, fact.number) for word in sentence
            ]
            words += sentence
            weights += [1.0 if key else recipe.filler_weight for key in recalled]
            keys += recalled
        return Example([self.ids[w] for w in words[:length]], weights[:length], keys[:length])

    def recall(self, length: int) -> Example:
        """A document of facts among filler, then as many questions with answers as fit."""
        rng, recipe = self.rng, self.recipe
        turn = 22
        asked = max(2, min(40, length // 44))
        room = length - asked * turn - 2
        count = rng.randint(2, max(3, min(100, room // 24)))
        count = min(count, room // 14)
        document = documents.document(rng, room, count)
        words: list[str] = ["<bos>", "<user>", *document.words]
        weights = [0.0, 0.0, *([recipe.filler_weight] * len(document.words))]
        keys = [False] * len(words)
        asked_facts = rng.sample(document.facts, min(asked, count))
        while len(asked_facts) < asked:
            asked_facts.append(rng.choice(document.facts))
        for index, fact in enumerate(asked_facts):
            question = [*documents.question_words(fact), "<end>", "<assistant>"]
            if index:
                question = ["<user>", *question]
            answer = [*documents.answer_words(fact), "<end>"]
            words += question + answer
            recalled = [word in (fact.place, fact.number) for word in answer]
            weights += [0.0] * len(question)
            weights += [1.0 if key else recipe.filler_weight for key in recalled]
            keys += [False] * len(question) + recalled
        missing = length - len(words)
        ids = [self.ids[word] for word in words] + [self.ids["<pad>"]] * missing
        return Example(ids, weights + [0.0] * missing, keys + [False] * missing)

    def batch(self, kind: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """``step_tokens`` worth of examples: ids, weights and keys, each ``[batch, length]``."""
        make = {"copy": self.copying, "pairs": self.pairs}.get(kind, self.recall)
        examples = [make(length) for _ in range(max(1, self.recipe.step_tokens // length))]
        ids, weights, keys = zip(*examples, strict=True)
        return torch.tensor(ids), torch.tensor(weights), torch.tensor(keys)


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(documents.vocabulary()),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        initializer_range=recipe.init_std,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers[recipe.base_layers :]:  # the identity, until trained
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


class Losses(NamedTuple):
    total: Tensor
    filler: float
    recall: list[float]  # share of recalled tokens that are right, per exit, the last layer last


def losses(model: LlamaForCausalLM, recipe: Recipe, batch: tuple[Tensor, Tensor, Tensor],
           generator: torch.Generator) -> Losses:  # fmt: skip
    """The weighted loss of the last layer plus ``exit_weight`` times that of each exit.

    Filler predictions are a random sample: the head costs as much as several layers otherwise.
    """
    ids, weights, keys = batch
    states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    target, weight, key = ids[:, 1:], weights[:, 1:], keys[:, 1:]
    drawn = torch.rand(target.shape, generator=generator) < recipe.filler_sample
    chosen = (key | drawn) & (weight > 0)
    scale = torch.where(key, weight, weight / recipe.filler_sample)[chosen]
    target, key = target[chosen], key[chosen]
    total, right, filler = torch.zeros(()), [], 0.0
    depth = model.config.num_hidden_layers
    for layer in (*(exit for exit in recipe.exits if exit < depth), depth):
        state = states[layer][:, :-1][chosen]
        if layer < depth:  # transformers applies the final norm to the last state only
            state = model.model.norm(state)
        logits = model.lm_head(state)
        each = F.cross_entropy(logits, target, reduction="none")
        share = 1.0 if layer == depth else recipe.exit_weight
        total = total + share * (each * scale).sum() / scale.sum()
        right.append(float((logits.argmax(-1) == target)[key].float().mean()))
        if layer == depth and not bool(key.all()):
            filler = float(each.detach()[~key].mean())
    return Losses(total, filler, right)


class Stage(NamedTuple):
    kind: str
    length: int
    tokens: int
    bar: float
    depth: int


def stages(recipe: Recipe) -> list[Stage]:
    lengths = [recipe.start_length]
    while lengths[-1] < recipe.context:
        lengths.append(min(recipe.context, int(lengths[-1] * recipe.growth)))
    most, base = recipe.max_stage_tokens, recipe.base_layers
    plan = [
        Stage("copy", recipe.start_length, most, 0.9, base),
        Stage("pairs", recipe.pair_length, most, recipe.advance_at, base),
    ]
    plan += [Stage("recall", n, most, recipe.advance_at, base) for n in lengths[1:]]
    return [*plan, Stage("finish", recipe.context, recipe.finish_tokens, 2.0, recipe.layers)]


def train(recipe: Recipe, out: Path, *, threads: int = 1, report_every: int = 20) -> None:
    """Run the recipe; write model, tokenizer, ``training_log.jsonl`` into ``out``."""
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    sampler = Sampler(recipe, recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = new_model(recipe)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "training_log.jsonl").open("w")
    log.write(json.dumps({"recipe": asdict(recipe), "torch": torch.__version__}) + "\n")
    step, seen, begun = 0, 0, time.monotonic()
    for stage in stages(recipe):
        spent, recall = 0, 0.0
        model.config.num_hidden_layers = stage.depth  # transformers runs that many layers
        while spent < stage.tokens and recall < stage.bar:
            rate = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps)
            if stage.kind == "finish":
                rate *= 1.0 - spent / stage.tokens
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = sampler.batch(stage.kind, stage.length)
            result = losses(model, recipe, batch, generator)
            optimizer.zero_grad(set_to_none=True)
            result.total.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step, seen, spent = step + 1, seen + batch[0].numel(), spent + batch[0].numel()
            recall = 0.9 * recall + 0.1 * result.recall[-1]
            if step % report_every == 0:
                row: dict[str, Any] = {
                    "step": step, "tokens": seen, "stage": stage.kind, "length": stage.length,
                    "loss": round(float(result.total.detach()), 4), "filler": round(result.filler, 4),
                    "recall": round(recall, 4), "exits": [round(x, 3) for x in result.recall],
                    "seconds": round(time.monotonic() - begun, 1),
                }  # fmt: skip
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(row, flush=True)
        model.config.num_hidden_layers = recipe.layers
        save(model, out)
    log.close()


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in bfloat16, the config and the tokenizer."""
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out, state_dict=weights)
    build_tokenizer(model.config.max_position_embeddings).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    train(Recipe(), arguments.out, threads=arguments.threads)


if __name__ == "__main__":
    main()
