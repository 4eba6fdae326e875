"""Triton kernels of attention.  Importing this module needs Triton (``triton_backend`` does).

Notation as in ``attention/base.py``.  A *row* is one query of one head; the rows of a group (the
query heads of one KV head) share every key that is loaded.  Loaded numbers are converted to
float32 at once: the interpreter multiplies bfloat16 as raw bits, and ``tf32`` products of numbers
that had 16 bits are exact.  Entries that a query must not see are never loaded: a freed entry may
hold NaN.  ``*_pad`` is a size rounded up to a power of two.

Entries stored by a codec are attended to in their rotated form: queries are rotated once per
program, and outputs are rotated back when splits are combined.  Codes times scales have more digits
(at most 24) than tf32 keeps (11); this loss is far below that of the codec.
"""

# mypy: disable-error-code="import-not-found,import-untyped,misc,no-untyped-def"
# mypy: disable-error-code="untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from pyramidinfer.triton_codec import load_rotated, rotate

__all__ = [
    "INTERPRETED",
    "VERSION",
    "attend_rows",
    "combine_splits",
    "decode_split",
    "group_probs",
    "reduce_rows",
    "row_norms",
]


# --- pieces --------------------------------------------------------------------------------------


@triton.jit
def _load(pointer, at, seen, size: tl.constexpr, pad: tl.constexpr):
    """Rows of ``size`` numbers that begin at ``at`` ``[n]`` → ``[n, pad]``, 0 for unseen rows."""
    column = tl.arange(0, pad)
    mask = seen[:, None] & (column < size)[None, :]
    return tl.load(pointer + at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _logits(queries, keys, scale, softcap, capped: tl.constexpr, precision: tl.constexpr):
    """queries ``[rows, D]``, keys ``[n, D]`` → ``[rows, n]``."""
    logits = tl.dot(queries, tl.trans(keys), input_precision=precision) * scale
    if capped:  # softcap · tanh(logits / softcap), by an exponential that cannot overflow
        small = tl.exp(-2.0 * tl.abs(logits) / softcap)
        bent = softcap * (1.0 - small) / (1.0 + small)
        logits = tl.where(logits < 0.0, -bent, bent)
    return logits


@triton.jit
def _visible(q_pos, k_pos, window, windowed: tl.constexpr):
    """q_pos ``[rows]``, k_pos ``[n]`` → bool ``[rows, n]``."""
    visible = k_pos[None, :] <= q_pos[:, None]
    if windowed:
        visible = visible & (k_pos[None, :] > q_pos[:, None] - window)
    return visible


@triton.jit
def _lift(top, logits):
    """The new running maximum, and the number to subtract: 0 if a row has seen nothing so far."""
    top = tl.maximum(top, tl.max(logits, 1))
    return top, tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _norm(top, total):
    """Log-sum-exp from running maximum and sum; -inf if nothing was seen."""
    return tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@triton.jit
def _share(total):
    """1 / total, or 1 if nothing was seen (all values are 0 then)."""
    return 1.0 / tl.where(total > 0.0, total, 1.0)


# --- decoding ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["table_stride", "width"])
def decode_split(
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    positions,
    tables,
    lengths,
    q_pos,
    outs,
    norms,
    logits,
    scale,
    softcap,
    window,
    table_stride,
    width,
    heads: tl.constexpr,
    group: tl.constexpr,
    group_pad: tl.constexpr,
    key_dim: tl.constexpr,
    key_pad: tl.constexpr,
    value_dim: tl.constexpr,
    value_pad: tl.constexpr,
    key_group: tl.constexpr,
    value_group: tl.constexpr,
    codec: tl.constexpr,
    page_size: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
    stores_logits: tl.constexpr,
    precision: tl.constexpr,
):
    """One group's rows over one split of its KV head's entries.  Grid ``[R, K, splits]``.

    The splits of a head are equal parts of *its* length, in whole blocks; splits past its end see
    nothing.  outs ``[R, H, splits, V]``, norms ``[R, H, splits]``, logits ``[R, H, width]``.
    codec : its number; 0: none, without scales and groups.  With a codec, outs are rotated.
    """
    request, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = request.to(tl.int64) * tl.num_programs(1) + kv
    length = tl.load(lengths + head).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, splits), block) * block
    first = split * part
    end = tl.minimum(first + part, length)
    member = tl.arange(0, group_pad)
    ours = member < group
    row = request.to(tl.int64) * heads + kv * group + member
    query = _load(queries, row * key_dim, ours, key_dim, key_pad)
    if codec:
        query = rotate(query, key_group, codec, False, precision)
    top = tl.full([group_pad], float("-inf"), tl.float32)
    total = tl.zeros([group_pad], tl.float32)
    out = tl.zeros([group_pad, value_pad], tl.float32)
    for start in range(first, end, block):
        entry = start + tl.arange(0, block)
        seen = entry < end
        at = tables + head * table_stride + entry // page_size
        page = tl.load(at, mask=seen, other=0).to(tl.int64)
        slot = page * page_size + entry % page_size
        if windowed:
            k_pos = tl.load(positions + slot, mask=seen, other=0)
            seen = seen & (k_pos > tl.load(q_pos + request) - window)
        if codec:
            key = load_rotated(keys, key_scales, slot, seen, key_dim, key_pad, key_group, codec)
        else:
            key = _load(keys, slot * key_dim, seen, key_dim, key_pad)
        logit = _logits(query, key, scale, softcap, capped, precision)
        logit = tl.where(seen[None, :], logit, float("-inf"))
        if stores_logits:
            held = ours[:, None] & (entry < end)[None, :]
            tl.store(logits + row[:, None] * width + entry[None, :], logit, mask=held)
        before = top
        top, base = _lift(top, logit)
        weight = tl.exp(logit - base[:, None])
        shrink = tl.exp(before - base)
        if codec:
            value = load_rotated(
                values, value_scales, slot, seen, value_dim, value_pad, value_group, codec
            )
        else:
            value = _load(values, slot * value_dim, seen, value_dim, value_pad)
        total = total * shrink + tl.sum(weight, 1)
        out = out * shrink[:, None] + tl.dot(weight, value, input_precision=precision)
    place = row * splits + split
    tl.store(norms + place, _norm(top, total), mask=ours)
    column = tl.arange(0, value_pad)
    tl.store(
        outs + place[:, None] * value_dim + column[None, :],
        out * _share(total)[:, None],
        mask=ours[:, None] & (column < value_dim)[None, :],
    )


@triton.jit
def combine_splits(
    outs,
    norms,
    out,
    lse,
    value_dim: tl.constexpr,
    value_pad: tl.constexpr,
    value_group: tl.constexpr,
    codec: tl.constexpr,
    splits: tl.constexpr,
    split_pad: tl.constexpr,
    precision: tl.constexpr,
):
    """Splits weighted by their share of the whole softmax.  Grid ``[R · H]``.

    With a codec, outputs are rotated back (``split_pad`` is at least 16 then).
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, split_pad)
    there = split < splits
    norm = tl.load(norms + row * splits + split, mask=there, other=float("-inf"))
    top = tl.max(norm, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(norm - base)
    total = tl.sum(weight, 0)
    part = _load(outs, (row * splits + split) * value_dim, there, value_dim, value_pad)
    part = part * weight[:, None]
    if codec:
        part = rotate(part, value_group, codec, True, precision)
    mixed = tl.sum(part, 0) * _share(total)
    column = tl.arange(0, value_pad)
    tl.store(out + row * value_dim + column, mixed, mask=column < value_dim)
    tl.store(lse + row, _norm(base, total))


@triton.jit(do_not_specialize=["width"])
def group_probs(
    logits,
    lse,
    lengths,
    probs,
    width,
    heads: tl.constexpr,
    group: tl.constexpr,
    group_pad: tl.constexpr,
    block: tl.constexpr,
):
    """Attention weights summed over a group, 0 past a head's end.  Grid ``[R, K, blocks of
    width]``.

    logits ``[R, H, width]``, lse ``[R, H]`` → probs ``[R, K, width]``.
    """
    request, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entry = tl.program_id(2) * block + tl.arange(0, block)
    member = tl.arange(0, group_pad)
    row = request * heads + kv * group + member
    length = tl.load(lengths + request * tl.num_programs(1) + kv)
    seen = (member < group)[:, None] & (entry < length)[None, :]
    logit = tl.load(logits + row[:, None] * width + entry[None, :], mask=seen, other=0.0)
    norm = tl.load(lse + row, mask=member < group, other=0.0)
    weight = tl.where(seen, tl.exp(tl.where(seen, logit - norm[:, None], 0.0)), 0.0)
    at = probs + (request * tl.num_programs(1) + kv) * width + entry
    tl.store(at, tl.sum(weight, 0), mask=entry < width)


# --- many queries over one request's entries -----------------------------------------------------
#
# queries [n, H, D] contiguous; keys [K, m, D], k_pos [K, m] by strides; a block of rows is
# queries × heads of one group, flattened: row r is query r // group, member r % group.
# ``ordered``: the last n entries are the queries' own, in order (later entries need not be read).


@triton.jit(
    do_not_specialize=[
        "count",
        "entries",
        "key_head",
        "key_step",
        "value_head",
        "value_step",
        "pos_head",
    ]
)
def attend_rows(
    queries,
    keys,
    values,
    q_pos,
    k_pos,
    out,
    scale,
    softcap,
    window,
    count,
    entries,
    key_head,
    key_step,
    value_head,
    value_step,
    pos_head,
    heads: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    key_pad: tl.constexpr,
    value_dim: tl.constexpr,
    value_pad: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
    precision: tl.constexpr,
):
    """Causal attention by position, out ``[n, H, V]``.  Grid ``[blocks of rows, K]``."""
    kv = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * rows + tl.arange(0, rows)
    step = number // group
    ours = step < count
    row = step.to(tl.int64) * heads + kv * group + number % group
    query = _load(queries, row * key_dim, ours, key_dim, key_pad)
    here = tl.load(q_pos + step, mask=ours, other=-1)
    last = tl.minimum((tl.program_id(0) * rows + rows - 1) // group, count - 1)
    top = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    mixed = tl.zeros([rows, value_pad], tl.float32)
    for start in range(0, entries - count + last + 1, block):
        entry = start + tl.arange(0, block)
        live = entry < entries
        there = tl.load(k_pos + kv * pos_head + entry, mask=live, other=0)
        seen = _visible(here, there, window, windowed) & live[None, :]
        if tl.max(seen.to(tl.int32)) > 0:
            at = entry.to(tl.int64)
            key = _load(keys, kv * key_head + at * key_step, live, key_dim, key_pad)
            logit = _logits(query, key, scale, softcap, capped, precision)
            logit = tl.where(seen, logit, float("-inf"))
            before = top
            top, base = _lift(top, logit)
            weight = tl.exp(logit - base[:, None])
            shrink = tl.exp(before - base)
            value = _load(values, kv * value_head + at * value_step, live, value_dim, value_pad)
            total = total * shrink + tl.sum(weight, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weight, value, input_precision=precision)
    column = tl.arange(0, value_pad)
    tl.store(
        out + row[:, None] * value_dim + column[None, :],
        mixed * _share(total)[:, None],
        mask=ours[:, None] & (column < value_dim)[None, :],
    )


@triton.jit(do_not_specialize=["count", "entries", "key_head", "key_step", "pos_head"])
def row_norms(
    queries,
    keys,
    q_pos,
    k_pos,
    norms,
    scale,
    softcap,
    window,
    count,
    entries,
    key_head,
    key_step,
    pos_head,
    heads: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    key_pad: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
    ordered: tl.constexpr,
    precision: tl.constexpr,
):
    """Log-sum-exps ``[splits, n, H]`` of parts of the entries.  Grid ``[blocks, K, splits]``."""
    kv, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    number = tl.program_id(0) * rows + tl.arange(0, rows)
    step = number // group
    ours = step < count
    row = step.to(tl.int64) * heads + kv * group + number % group
    query = _load(queries, row * key_dim, ours, key_dim, key_pad)
    here = tl.load(q_pos + step, mask=ours, other=-1)
    stop = entries
    if ordered:
        last = tl.minimum((tl.program_id(0) * rows + rows - 1) // group, count - 1)
        stop = entries - count + last + 1
    part = tl.cdiv(tl.cdiv(stop, splits), block) * block
    top = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    for start in range(split * part, tl.minimum(split * part + part, stop), block):
        entry = start + tl.arange(0, block)
        live = entry < stop
        there = tl.load(k_pos + kv * pos_head + entry, mask=live, other=0)
        seen = _visible(here, there, window, windowed) & live[None, :]
        at = kv * key_head + entry.to(tl.int64) * key_step
        key = _load(keys, at, live, key_dim, key_pad)
        logit = _logits(query, key, scale, softcap, capped, precision)
        logit = tl.where(seen, logit, float("-inf"))
        before = top
        top, base = _lift(top, logit)
        total = total * tl.exp(before - base) + tl.sum(tl.exp(logit - base[:, None]), 1)
    tl.store(norms + split.to(tl.int64) * count * heads + row, _norm(top, total), mask=ours)


@triton.jit(do_not_specialize=["count", "entries", "part", "key_head", "key_step", "pos_head"])
def reduce_rows(
    queries,
    keys,
    q_pos,
    k_pos,
    lse,
    ramp,
    scores,
    scale,
    softcap,
    window,
    count,
    entries,
    part,
    key_head,
    key_step,
    pos_head,
    heads: tl.constexpr,
    group: tl.constexpr,
    group_pad: tl.constexpr,
    together: tl.constexpr,
    key_dim: tl.constexpr,
    key_pad: tl.constexpr,
    steps: tl.constexpr,
    block: tl.constexpr,
    over_heads: tl.constexpr,
    over_rows: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
    ordered: tl.constexpr,
    precision: tl.constexpr,
):
    """Weights ``exp(logit - lse)`` of queries over a block of entries, reduced to one score each.

    Grid ``[blocks of entries, wide, parts of the queries]``; ``together`` KV heads make one score
    (all, or one).  lse ``[n, H]``, ramp ``[n]``; scores ``[parts, wide, m]``: sums, largest
    weights or counts ("below") over ``part`` queries.  ``over_heads``: sum, mean or max.
    """
    entry = tl.program_id(0) * block + tl.arange(0, block)
    live = entry < entries
    first = tl.program_id(2) * part
    stop = tl.minimum(first + part, count)
    if ordered:  # queries older than the block's first entry do not see it
        first = tl.maximum(first, tl.program_id(0) * block - (entries - count))
    member = tl.arange(0, steps * group_pad) % group_pad
    within = tl.arange(0, steps * group_pad) // group_pad
    score = tl.zeros([block], tl.float32)
    for start in range(first, stop, steps):
        query_at = start + within
        ours = (query_at < stop) & (member < group)
        here = tl.load(q_pos + query_at, mask=ours, other=-1)
        mixed = tl.zeros([steps, block], tl.float32)
        for number in range(together):
            kv = tl.program_id(1).to(tl.int64) * together + number
            row = query_at.to(tl.int64) * heads + kv * group + member
            query = _load(queries, row * key_dim, ours, key_dim, key_pad)
            at = kv * key_head + entry.to(tl.int64) * key_step
            key = _load(keys, at, live, key_dim, key_pad)
            there = tl.load(k_pos + kv * pos_head + entry, mask=live, other=0)
            seen = _visible(here, there, window, windowed) & live[None, :] & ours[:, None]
            logit = _logits(query, key, scale, softcap, capped, precision)
            norm = tl.load(lse + row, mask=ours, other=0.0)
            weight = tl.where(seen, tl.exp(tl.where(seen, logit - norm[:, None], 0.0)), 0.0)
            weight = tl.reshape(weight, [steps, group_pad, block])
            if over_heads == "max":
                mixed = tl.maximum(mixed, tl.max(weight, 1))
            else:
                mixed += tl.sum(weight, 1)
        if over_heads == "mean":
            mixed = mixed / (group * together)
        step = start + tl.arange(0, steps)
        if over_rows == "below":  # together is 1; slightly below even, as in the reference
            here_each = tl.load(q_pos + step, mask=step < stop, other=0)
            own = tl.program_id(1).to(tl.int64) * pos_head
            there = tl.load(k_pos + own + entry, mask=live, other=0)
            even = (1.0 - 1e-5) / (here_each + 1).to(tl.float32)
            low = (mixed < even[:, None]) & (there[None, :] <= here_each[:, None])
            score += tl.sum((low & (step < stop)[:, None]).to(tl.float32), 0)
        else:
            mixed *= tl.load(ramp + step, mask=step < stop, other=0.0)[:, None]
            if over_rows == "max":
                score = tl.maximum(score, tl.max(mixed, 0))
            else:
                score += tl.sum(mixed, 0)
    place = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scores + place * entries + entry, score, mask=live)


#: Whether kernels run in Triton's interpreter: ``TRITON_INTERPRET=1`` was set before the
#: first import of Triton, because Triton's own functions are also made for one of the two modes.
INTERPRETED = not any(isinstance(each, triton.runtime.JITFunction) for each in (_norm, tl.sum))
VERSION = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
