"""Train the model shipped in the repository, from generated text alone.

``python -m pyramidinfer.lab.train --out DIR`` reproduces the model (up to float rounding).

Stages: pure copying (a random sequence repeated to fill the window), restating facts in shuffled
order, recall of facts among filler with the length growing 1.5x whenever recall passes a bar, and
two stages at mixed lengths, the second with the learning rate falling to zero.  Only the first
``base_layers`` are trained before the last stage; the others start as the identity and are trained
in it.
The final norm and head are also applied after the *exit* layers (as in LayerSkip,
arXiv 2404.16710).  Both make deep layers redundant, as in large models (the paper's inference
context redundancy) and unlike in a tiny model with plain training.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pyramidinfer.lab import documents
from pyramidinfer.lab.tokenizer import build_tokenizer

__all__ = ["LOG", "Recipe", "train"]

LOG = "training_log.jsonl"
NEVER = 2.0  # recall cannot exceed it


@dataclass(frozen=True, slots=True)
class Recipe:
    """All settings that determine the trained model."""

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
    grow_to: int = 2400
    advance_at: float = 0.93
    max_stage_tokens: int = 8_000_000
    mixed_tokens: int = 5_000_000
    finish_tokens: int = 3_000_000
    mixed_step_tokens: int = 4096
    mixed_lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    init_std: float = 0.05
    seed: int = 1


class Example(NamedTuple):
    """Token ids, the loss weight of each, and ``keys``: the tokens that must be recalled."""

    ids: list[int]
    weights: list[float]
    keys: list[bool]


class Sampler:
    """Makes training sequences; every call returns a new document."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.rng = random.Random(seed)
        self.ids = {word: index for index, word in enumerate(documents.vocabulary())}
        self.content = [i for w, i in self.ids.items() if w not in documents.SPECIALS]

    def copying(self, length: int) -> Example:
        """A random sequence of period 4 to 16, repeated to ``length``."""
        period = self.rng.randint(4, 16)
        cycle = self.rng.choices(self.content, k=period)
        ids = [self.ids["<bos>"], *(cycle * (length // period + 1))][:length]
        keys = [index > period for index in range(length)]
        return Example(ids, [1.0 if key else 0.0 for key in keys], keys)

    def pairs(self, length: int) -> Example:
        """A few facts, then the same facts repeatedly in random order.

        The number of words between the name and the recalled part differs between sequences:
        from none to the whole sentence.
        """
        rng, recipe = self.rng, self.recipe
        facts = documents.sample_facts(rng, rng.randint(2, 6))
        gap = rng.randrange(5)
        words, weights, keys = ["<bos>"], [0.0], [False]
        again = [*facts, *rng.choices(facts, k=length // 2)]
        for index, fact in enumerate(again):
            sentence = (
                fact.words()
                if gap == 4
                else [fact.last, *["is", "in", fact.place][3 - gap :], fact.number]
            )
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

    def batch(self, kind: str, length: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """About ``tokens`` of examples: ids, weights and keys, each ``[batch, length]``."""
        make = {"copy": self.copying, "pairs": self.pairs}.get(kind, self.recall)
        examples = [make(length) for _ in range(max(1, tokens // length))]
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
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers[recipe.base_layers :]:  # the identity, until trained
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


class Losses(NamedTuple):
    total: Tensor
    filler: float
    recall: list[float]  # share of recalled tokens that are right, per exit and last layer


def losses(
    model: LlamaForCausalLM,
    recipe: Recipe,
    batch: tuple[Tensor, Tensor, Tensor],
    generator: torch.Generator,
) -> Losses:
    """The weighted loss of the last layer plus ``exit_weight`` times that of each exit.

    Filler predictions are a random sample, because the head would otherwise cost as much as several
    layers.
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
    """``lengths``: each step draws one;  ``bar``: recall at which the stage ends early;
    ``depth``: layers that run;  ``fresh``: starts from the saved weights with a new optimizer."""

    kind: str
    lengths: tuple[int, ...]
    step_tokens: int
    tokens: int
    bar: float
    depth: int
    fresh: bool = False


def stages(recipe: Recipe) -> list[Stage]:
    lengths = [recipe.start_length]
    while lengths[-1] < recipe.grow_to:
        lengths.append(int(lengths[-1] * recipe.growth))
    step, most, base = recipe.step_tokens, recipe.max_stage_tokens, recipe.base_layers
    bar, mixed = recipe.advance_at, (recipe.mixed_lengths, recipe.mixed_step_tokens)
    return [
        Stage("copy", (recipe.start_length,), step, most, 0.9, base),
        Stage("pairs", (recipe.pair_length,), step, most, bar, base),
        *(Stage("recall", (length,), step, most, bar, base) for length in lengths[1:]),
        Stage("mixed", *mixed, recipe.mixed_tokens, NEVER, base, fresh=True),
        Stage("finish", *mixed, recipe.finish_tokens, NEVER, recipe.layers, fresh=True),
    ]


class Trainer:
    """Runs stages on one model and writes the log."""

    def __init__(self, recipe: Recipe, model: LlamaForCausalLM, log: TextIO) -> None:
        self.recipe, self.model, self.log = recipe, model, log
        self.step, self.seen, self.begun = 0, 0, time.monotonic()
        self.restart(recipe.seed)

    def restart(self, seed: int) -> None:
        """A fresh optimizer and fresh random numbers."""
        self.sampler = Sampler(self.recipe, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.first_step = self.step
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )

    def run(self, stage: Stage, report_every: int = 20) -> None:
        """Train until recall passes the stage's bar or all its tokens are used."""
        recipe, spent, recall = self.recipe, 0, 0.0
        self.model.config.num_hidden_layers = stage.depth  # transformers runs that many layers
        while spent < stage.tokens and recall < stage.bar:
            rate = recipe.learning_rate
            rate *= min(1.0, (self.step - self.first_step + 1) / recipe.warmup_steps)
            if stage.kind == "finish":
                rate *= 1.0 - spent / stage.tokens
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            length = self.sampler.rng.choice(stage.lengths)
            batch = self.sampler.batch(stage.kind, length, stage.step_tokens)
            result = losses(self.model, recipe, batch, self.generator)
            self.optimizer.zero_grad(set_to_none=True)
            result.total.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step, spent = self.step + 1, spent + batch[0].numel()
            self.seen += batch[0].numel()
            recall = 0.9 * recall + 0.1 * result.recall[-1]
            if self.step % report_every == 0:
                self.report(stage.kind, length, result, recall)
        self.model.config.num_hidden_layers = recipe.layers

    def report(self, kind: str, length: int, result: Losses, recall: float) -> None:
        row = {
            "step": self.step,
            "tokens": self.seen,
            "stage": kind,
            "length": length,
            "loss": round(float(result.total.detach()), 4),
            "filler": round(result.filler, 4),
            "recall": round(recall, 4),
            "exits": [round(x, 3) for x in result.recall],
            "seconds": round(time.monotonic() - self.begun, 1),
        }
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        print(row, flush=True)


def train(recipe: Recipe, out: Path, *, threads: int = 1, resume: Path | None = None) -> None:
    """Run the recipe; write model, tokenizer and ``training_log.jsonl`` into ``out``.

    The mixed and finish stages start from the saved (bfloat16) weights, so training can be resumed
    before either of them: ``resume`` is a folder that the stage before has written.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    model, plan = new_model(recipe), stages(recipe)
    out.mkdir(parents=True, exist_ok=True)
    earlier = [json.loads(row) for row in (resume / LOG).read_text().splitlines()] if resume else []
    if resume:
        done = "mixed" if earlier[-1]["stage"] == "mixed" else "recall"
        plan = plan[max(i for i, stage in enumerate(plan) if stage.kind == done) + 1 :]
        load(model, resume)
    with (out / LOG).open("w") as log:
        trainer = Trainer(recipe, model, log)
        for row in [{"recipe": asdict(recipe)}, *earlier[1:]]:
            log.write(json.dumps(row) + "\n")
        if resume:
            trainer.step, trainer.seen = earlier[-1]["step"], earlier[-1]["tokens"]
            trainer.begun -= earlier[-1]["seconds"]
        for index, stage in enumerate(plan):
            if stage.fresh:
                if index:
                    load(model, out)
                trainer.restart(recipe.seed + len(stages(recipe)) - len(plan) + index)
            trainer.run(stage)
            save(model, out)


def load(model: LlamaForCausalLM, folder: Path) -> None:
    """Load saved weights."""
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(saved.state_dict())


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights (in bfloat16), the config and the tokenizer."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out)
    build_tokenizer(model.config.max_position_embeddings).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="folder to resume from before mixed or finish")
    arguments = parser.parse_args()
    train(Recipe(), arguments.out, threads=arguments.threads, resume=arguments.resume)


if __name__ == "__main__":
    main()
