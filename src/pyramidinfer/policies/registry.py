"""Policies by name; every list of policies elsewhere comes from this table."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from typing import Any

from pyramidinfer.config import nearest
from pyramidinfer.policies.base import Policy
from pyramidinfer.policies.chunkkv import ChunkKV
from pyramidinfer.policies.duo import Duo
from pyramidinfer.policies.expected_attention import ExpectedAttention
from pyramidinfer.policies.fastkv import FastKV
from pyramidinfer.policies.full import Full
from pyramidinfer.policies.h2o import H2O
from pyramidinfer.policies.keydiff import KeyDiff
from pyramidinfer.policies.kvzip import KVzip
from pyramidinfer.policies.pyramid import Pyramid
from pyramidinfer.policies.pyramidinfer import PyramidInfer
from pyramidinfer.policies.pyramidkv import PyramidKV
from pyramidinfer.policies.rkv import RKV
from pyramidinfer.policies.scissorhands import Scissorhands
from pyramidinfer.policies.snapkv import SnapKV
from pyramidinfer.policies.streaming_llm import StreamingLLM
from pyramidinfer.policies.tova import TOVA
from pyramidinfer.policies.triattention import TriAttention

__all__ = ["POLICIES", "make_policy", "parse_options", "parse_policy", "parse_spec"]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Full,
        Pyramid,
        PyramidInfer,
        Duo,
        StreamingLLM,
        H2O,
        Scissorhands,
        SnapKV,
        PyramidKV,
        TOVA,
        FastKV,
        ChunkKV,
        KeyDiff,
        ExpectedAttention,
        KVzip,
        RKV,
        TriAttention,
    )
}


def make_policy(policy: str | Policy, keep: float | None = None, **options: Any) -> Policy:
    """Make a policy from its name and options, or return the given one with ``keep`` set.

    Raises ``ValueError`` for an unknown name or option (with the nearest one) and for ``keep``
    outside (0, 1].
    """
    if keep is not None and (
        isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1
    ):
        raise ValueError(f"keep={keep!r} must be above 0 and at most 1")
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}; {nearest(policy, POLICIES)}")
        chosen = POLICIES[policy]
        known = [each.name for each in fields(chosen)]
        for name in options:
            if name not in known:
                raise ValueError(
                    f"policy {policy!r} has no option {name!r}; {nearest(name, known)}"
                )
        return chosen(**options) if keep is None else chosen(**options, keep=keep)  # type: ignore[call-arg]
    if not isinstance(policy, Policy):
        raise ValueError(f"policy={policy!r} is neither a name nor a policy object")
    if options:
        raise ValueError(f"options {sorted(options)} belong in the policy object; set them there")
    if keep is not None and "keep" not in {each.name for each in fields(policy)}:
        raise ValueError(f"policy {type(policy).__name__} has no option 'keep'")
    return policy if keep is None else replace(policy, keep=keep)  # type: ignore[call-arg]


def parse_policy(spec: str, keep: float | None = None) -> Policy:
    """Parse ``"snapkv"`` or ``"snapkv:window=8,kernel=5"`` into a policy.

    Values are Python literals; anything else is text.  Raises ``ValueError`` as ``make_policy``
    does, and for an option without ``=``.
    """
    name, options = parse_spec(spec)
    if keep is not None and "keep" in options:
        raise ValueError(f"{spec!r}: keep={keep:g} is already given; leave it out here")
    return make_policy(name, options.pop("keep", keep), **options)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split ``NAME`` or ``NAME:option=value,…`` into the name and the options."""
    name, _, tail = spec.partition(":")
    return name, parse_options(name, tail.split(",") if tail else [])


def parse_options(name: str, items: list[str]) -> dict[str, Any]:
    """Parse a policy's options from texts ``NAME=VALUE``."""
    values: dict[str, Any] = {}
    known = [each.name for each in fields(POLICIES[name])] if name in POLICIES else []
    for item in items:
        key, sign, text = item.partition("=")
        if not sign:
            raise ValueError(f"option {item!r} of {name!r}: write NAME=VALUE")
        if known and key not in known:
            raise ValueError(f"policy {name!r} has no option {key!r}; {nearest(key, known)}")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values
