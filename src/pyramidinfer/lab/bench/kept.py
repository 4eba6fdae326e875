"""Our methods compared with kvpress's methods on one text: kept entries and their ranking.

``python -m pyramidinfer.lab.bench.kept``, or ``make bench-kept``.

Both get the same model in float32, the same token ids and the same share to keep.  kvpress runs in
its own environment (``make peers``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from pyramidinfer.config import check_whole, nearest
from pyramidinfer.lab.bench.engines import Engine
from pyramidinfer.lab.bench.peers_drive import ask_driver
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.samples import SHIPPED, Subject
from pyramidinfer.models.catalog import find_model
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Policy
from pyramidinfer.policies.base import check_keep
from pyramidinfer.policies.registry import parse_policy
from pyramidinfer.policies.rule import pool_neighbours
from pyramidinfer.types import Best, Keep, Observation, State, TokenIds

__all__ = [
    "CASES",
    "HEAD",
    "Case",
    "KeptPlan",
    "agreement",
    "kept_rows",
    "main",
    "ranks",
    "run_kept",
]

Row = dict[str, Any]
#: The unit that shares a budget, and therefore keeps the same number of entries in both.
Level = Literal["head", "layer", "model"]
KVPRESS = Engine("kvpress", "kvpress", "keep_kvpress.py", dtype="float32")


@dataclass(frozen=True)
class Case:
    """One of our methods and its counterpart.

    policy : ours, as on the command line, without ``keep``;  press : class and options of theirs
        (an option that is such a pair itself is the wrapped press);  level : the unit that shares
        a budget.
    first, last : tokens at either end that both always keep; they are left out of ranks.
    why : differences by definition.
    """

    policy: str
    press: tuple[str, dict[str, Any]]
    level: Level = "head"
    first: int = 0
    last: int = 0
    why: str = ""

    @property
    def theirs(self) -> str:
        """Their name of the method, with a wrapped press in brackets."""
        return _named(self.press)


def _named(press: tuple[str, dict[str, Any]]) -> str:
    name, options = press
    inner = ", ".join(_named(each) for each in options.values() if isinstance(each, tuple))
    return f"{name}({inner})" if inner else name


def _spec(press: tuple[str, dict[str, Any]]) -> Row:
    """The method as the driver's input."""
    name, options = press
    plain = {key: _spec(each) if isinstance(each, tuple) else each for key, each in options.items()}
    return {"press": name, "options": plain}


SNAPKV = ("SnapKVPress", {"window_size": 32, "kernel_size": 7})
EXPECTED = (
    "ExpectedAttentionPress",
    {"n_future_positions": 512, "n_sink": 4, "epsilon": 0.02},
)
ADAPTIVE = (
    "kvpress gives each head the best entries of its safeguard and deals the rest by rank; here, "
    "as in Ada-KV's algorithm 1, a head has safeguard × the even budget + (1 - safeguard) × the "
    "entries that it wins by rank"
)

CASES: tuple[Case, ...] = (
    Case("streaming_llm", ("StreamingLLMPress", {"n_sink": 4})),
    Case("keydiff", ("KeyDiffPress", {})),
    Case("tova", ("TOVAPress", {}), why="kvpress always keeps the last token"),
    Case("snapkv", SNAPKV, last=32),
    Case(
        "snapkv:adaptive=True",
        ("AdaKVPress", {"press": SNAPKV, "alpha_safeguard": 0.2}),
        "layer",
        last=32,
        why=ADAPTIVE,
    ),
    Case(
        "pyramidkv",
        ("PyramidKVPress", {"window_size": 8, "kernel_size": 7, "beta": 20}),
        last=8,
        why="budgets: here the window comes on top of those that fall, in kvpress it is "
        "part of them",
    ),
    Case(
        "chunkkv:window=30",
        (
            "ChunkKVPress",
            {
                "press": ("SnapKVPress", {"window_size": 30, "kernel_size": 1}),
                "chunk_length": 10,
            },
        ),
        why="kvpress counts the window by chunks; the same where both end together, as here",
    ),
    Case("expected_attention:adaptive=False", EXPECTED, first=4),
    Case(
        "expected_attention",
        ("AdaKVPress", {"press": EXPECTED, "alpha_safeguard": 0.2}),
        "layer",
        first=4,
        why=ADAPTIVE,
    ),
    Case(
        "kvzip",
        ("KVzipPress", {"n_sink": 4, "chunk_size": 2048}),
        "model",
        first=4,
        why="nothing while the text is one chunk and what stands between it and its repetition is "
        "the same, as here",
    ),
    Case(
        "kvzip:chunk_length=300",
        ("KVzipPress", {"n_sink": 4, "chunk_size": 300}),
        "model",
        first=4,
        why="kvpress takes a softmax over a chunk's own entries, an entry's score from "
        "its own chunk only, and puts a line end in front of every further one",
    ),
)


@dataclass(frozen=True)
class KeptPlan:
    """Plain values.  model : folder or fetched model, of the Llama kind;  length : tokens of the
    text, a passage of the studies' text;  keep : share of its entries that stays."""

    model: str = "smollm2"
    length: int = 800
    keep: float = 0.3
    seed: int = 0
    threads: int = 1

    def check(self) -> None:
        """``ValueError`` if the plan cannot be run."""
        check_keep(self.keep)
        check_whole("length", self.length, 64)
        check_whole("threads", self.threads, 1)

    @property
    def subject(self) -> Subject:
        return Subject(self.model)


class Found(NamedTuple):
    """Results of one method: which entries stay, bool ``[layers, kv_heads, n]``, and the scores
    that rank them, of the same shape, if known."""

    kept: np.ndarray
    scores: np.ndarray | None


# --- measuring ------------------------------------------------------------------------------------


def run_kept(
    plan: KeptPlan,
    cases: Iterable[Case],
    out: Path,
    work: Path,
    *,
    environments: Path = Path(".peers"),
    drivers: Path = Path("benchmarks/peers"),
) -> Row:
    """Run both, compare, write ``out`` and return the result.

    ``ValueError`` with the reason if kvpress is missing or fails.
    """
    plan.check()
    cases = list(cases)
    work.mkdir(parents=True, exist_ok=True)
    folder = _plain_folder(plan.model, work)
    ids = plan.subject.corpus().passages(plan.seed, 1, plan.length, 1)[0].context
    job = {
        "model": str(folder),
        "ids": ids,
        "threads": plan.threads,
        "ratio": round(1 - plan.keep, 12),
        "cases": {case.policy: _spec(case.press) for case in cases},
    }
    answer = ask_driver(KVPRESS, job, plan.threads, environments, drivers, work)
    if "said" not in answer:
        raise ValueError(f"kvpress: {answer['status']}: {answer['reason']}")
    said = answer["said"]
    torch.set_num_threads(plan.threads)
    rows, apart = [], 0.0
    for case in cases:
        print(f"{case.policy} …", file=sys.stderr, flush=True)
        theirs = said["cases"][case.policy]
        ours, logits = _ours(plan, case, ids, theirs["question"])
        rows.append(_row(case, ours, _theirs(theirs, len(ids))))
        apart = max(apart, float((logits - torch.tensor(said["logits"])).abs().max()))
    result = {"rows": rows, "logits_apart": apart, "versions": said["versions"]}
    configuration = {**asdict(plan), "source": plan.subject.source}
    write_result(out, configuration, result)
    return result


def _plain_folder(model: str, work: Path) -> Path:
    """The model without its chat template, because kvpress's KVzip would mistake the start of the
    text for that of the template."""
    folder = Path(shipped_model() if model == SHIPPED else find_model(model)).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {model!r} must be a folder or a fetched model")
    plain = work / "model"
    shutil.rmtree(plain, ignore_errors=True)
    plain.mkdir()
    for file in folder.iterdir():
        if file.name == "tokenizer_config.json":
            settings = json.loads(file.read_text("utf-8"))
            settings.pop("chat_template", None)
            (plain / file.name).write_text(json.dumps(settings))
        elif file.name != "chat_template.jinja":
            (plain / file.name).symlink_to(file.resolve())
    return plain.resolve()


def _ours(
    plan: KeptPlan, case: Case, ids: TokenIds, question: TokenIds | None
) -> tuple[Found, Tensor]:
    """The entries that our engine keeps, and its logits after the text.  ``question``: token ids
    between the text and its repetition, for a method that reads it again."""
    policy, scores = parse_policy(case.policy, plan.keep), {}
    if question is not None:
        asked: Row = {"question": tuple(question)}
        policy = replace(policy, **asked)

    def take(layer: int, found: Tensor) -> None:
        scores[layer] = found.float().cpu().numpy()

    llm = plan.subject.llm(_watched(policy, take))
    trace = llm.trace(ids)
    heads = llm.engine.runner.layers_for(len(ids)).kv_heads
    kept = np.zeros((len(trace.prefill_positions), heads, len(ids)), dtype=bool)
    for layer, positions in enumerate(trace.prefill_positions):
        for head in range(heads):
            kept[layer, head, positions[head]] = True
    found = np.stack([scores[layer] for layer in sorted(scores)]) if scores else None
    return Found(kept, found), trace.prefill_logits.float()


def _watched(policy: Policy, take: Callable[[int, Tensor], None]) -> Policy:
    """The policy, with a hook: ``take`` receives, per layer, the scores ``[kv_heads, n]`` by which
    the policy ranks entries, if it has scores for every head."""
    kind: Any = type(policy)

    def score(self: Any, seen: Observation) -> Tensor:
        found: Tensor = kind.score(self, seen)
        rule = seen.rule
        assert isinstance(rule, Best)
        pooled = pool_neighbours(found, seen.positions, rule.kernel, rule.pool)
        if len(found) > 1:
            take(seen.view.layer, pooled.gather(1, seen.positions.argsort(1)))
        return found

    def retain(self: Any, seen: Observation, state: State) -> tuple[Keep, State]:
        for name, scores in state.items():
            if name.startswith("scores."):
                take(int(name.partition(".")[2]), scores)
        kept: tuple[Keep, State] = kind.retain(self, seen, state)
        return kept

    told = {"retain": retain} if policy.reads_again else {"score": score}
    watched: Policy = type(kind.__name__, (kind,), told)(
        **{each.name: getattr(policy, each.name) for each in fields(policy)}
    )
    return watched


def _theirs(found: Row, length: int) -> Found:
    kept = np.zeros((len(found["kept"]), len(found["kept"][0]), length), dtype=bool)
    for layer, heads in enumerate(found["kept"]):
        for head, positions in enumerate(heads):
            kept[layer, head, positions] = True
    return Found(kept, None if found["scores"] is None else np.array(found["scores"]))


# --- comparing ------------------------------------------------------------------------------------


def _row(case: Case, ours: Found, theirs: Found) -> Row:
    shape, other = ours.kept.shape, theirs.kept.shape
    if shape != other:
        raise ValueError(
            f"{case.policy}: layers, KV heads and tokens are {shape} here, {other} there"
        )
    correlation = None
    if ours.scores is not None and theirs.scores is not None:
        free = slice(case.first, shape[2] - case.last)
        correlation = ranks(ours.scores[..., free], theirs.scores[..., free], case.level)
    return {
        "policy": case.policy,
        "press": case.theirs,
        "options": _spec(case.press),
        "level": case.level,
        "why": case.why,
        "kept": [float(each.kept.sum(-1).mean()) for each in (ours, theirs)],
        **agreement(ours.kept, theirs.kept, case.level),
        "ranks": correlation,
    }


def _grouped(array: np.ndarray, level: Level) -> np.ndarray:
    """``[layers, kv_heads, n]`` → ``[groups, entries]``, a group shares a budget."""
    layers, heads, _ = array.shape
    return array.reshape({"head": layers * heads, "layer": layers, "model": 1}[level], -1)


def agreement(ours: np.ndarray, theirs: np.ndarray, level: Level) -> Row:
    """``same``: entries that both keep, divided by the larger number of kept entries; mean and
    minimum over all groups;  ``at_most``: upper bound of the mean, from the numbers of kept
    entries.

    Both arguments are bool ``[layers, kv_heads, n]`` with kept entries in every group.
    """
    mine, other = _grouped(ours, level), _grouped(theirs, level)
    counts = np.stack([mine.sum(1), other.sum(1)])
    same = (mine & other).sum(1) / counts.max(0)
    return {"same": _spread(same), "at_most": float((counts.min(0) / counts.max(0)).mean())}


def ranks(ours: np.ndarray, theirs: np.ndarray, level: Level) -> Row:
    """Spearman's rank correlation of scores ``[layers, kv_heads, n]``, mean and minimum
    over all groups."""
    pairs = zip(_grouped(ours, level), _grouped(theirs, level), strict=True)
    return _spread(np.array([spearmanr(mine, other).statistic for mine, other in pairs]))


def _spread(values: np.ndarray) -> Row:
    return {"mean": float(values.mean()), "least": float(values.min())}


# --- output ---------------------------------------------------------------------------------------

HEAD = (
    "ours",
    "kvpress",
    "budget of a",
    "kept by ours",
    "theirs",
    "same entries",
    "least",
    "ranks",
    "least",
)


def kept_rows(result: Row) -> list[list[str]]:
    """Cells as texts."""
    found = []
    for row in result["rows"]:
        ranked = row["ranks"]
        same = f"{row['same']['mean']:.1%}"
        if row["at_most"] < 1 - 1e-3:
            same += f" of {row['at_most']:.1%}"
        found.append(
            [
                row["policy"],
                row["press"],
                row["level"],
                *(f"{count:.1f}" for count in row["kept"]),
                same,
                f"{row['same']['least']:.1%}",
                *(
                    ["–"] * 2
                    if ranked is None
                    else [f"{ranked[key]:.4f}" for key in ("mean", "least")]
                ),
            ]
        )
    return found


def _table(plan: KeptPlan, result: Row) -> Table:
    table = Table(title=f"{plan.model}, {plan.length} tokens, keep={plan.keep:g}")
    for name in HEAD:
        table.add_column(name, justify="left" if name in HEAD[:3] else "right")
    for cells in kept_rows(result):
        table.add_row(*cells)
    return table


def _chosen(names: str) -> list[Case]:
    """Cases by our policy's name or by the beginning of a name; all without a name."""
    wanted = [name.strip() for name in names.split(";") if name.strip()]
    for name in wanted:
        if not any(case.policy.startswith(name) for case in CASES):
            known = [case.policy for case in CASES]
            raise ValueError(f"--only {name!r} is no case; {nearest(name, known)}")
    return [
        case for case in CASES if not wanted or any(case.policy.startswith(name) for name in wanted)
    ]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    usual = KeptPlan()
    parser = argparse.ArgumentParser(
        prog="python -m pyramidinfer.lab.bench.kept", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--only", default="", help="our policies (or name beginnings), separated by semicolons")
    add("--model", default=usual.model, help="a folder or a fetched model, of the Llama kind")
    add("--length", type=int, default=usual.length, help="tokens of the text")
    add("--keep", type=float, default=usual.keep)
    add("--threads", type=int, default=usual.threads)
    add("--json", type=Path, default=Path("benchmarks/results/kept_kvpress.json"))
    add("--work", type=Path, default=Path("out/kept"))
    add("--environments", type=Path, default=Path(".peers"))
    given = parser.parse_args(arguments)
    try:
        plan = KeptPlan(given.model, given.length, given.keep, threads=given.threads)
        result = run_kept(
            plan, _chosen(given.only), given.json, given.work, environments=given.environments
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    Console(width=150).print(_table(plan, result))
    print(f"logits after the text differ by at most {result['logits_apart']:.1e}\n{given.json}")


if __name__ == "__main__":
    main()
