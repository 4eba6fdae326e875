// The entries that decode attention reads: the pages of a request's KV heads, in blocks.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "codec.h"
#include "scratch.h"
#include "simd.h"

// Shapes: queries, out [R, H, D|V]; keys [pages, page, D], values [.., V], positions [.., ] int32;
// table [R, K, width] page numbers; lengths [R, K]; at [R]; lse [R, H]; probs [R, K, longest] or
// null.
template <class T>
struct Decode {
    const T* queries;
    const void *keys, *values;  // of T, or codes
    const int32_t* positions;
    const fp16 *key_scales, *value_scales;
    const int32_t* table;
    const int64_t *lengths, *at;
    T* out;
    float *lse, *probs;
    int requests, heads, kv_heads, key_dim, value_dim, page, width, codec;
    int64_t longest, window;  // window: number of positions that a query attends to, 0 for all
    float scale, softcap;     // softcap: 0 for none

    int group() const { return heads / kv_heads; }
};

// Products → logits: softcap(x * scale).
inline Vec logits(Vec x, float scale, float softcap) {
    x = x * set1(scale);
    if (softcap == 0.f) return x;
    const Vec y = x * set1(2.f * LOG2E / softcap);  // tanh(z) = 1 - 2 / (1 + e^2z)
    return set1(softcap) * (set1(1.f) - set1(2.f) / (set1(1.f) + exp2(y)));
}

// Sizes that all blocks share.
struct Shape {
    int group, key_dim, value_dim, padded_key, padded_value;
};

// Results of one span of entries for the heads of a group: sums of values [G][padded V], largest
// logits [G], and sums of weights [G][LANES].
struct Partial {
    float *values, *top, *sums;
};

// The results of one head.
inline Partial of_head(Partial all, int head, int padded_value) {
    return {all.values + head * padded_value, all.top + head, all.sums + head * LANES};
}

// n <= LANES entries of one page, from entry t on, stored from `slot` on.
struct Tile {
    int64_t t;
    size_t slot;
    int n;
};
// Tiles that are attended to at once; products with tile i start at i * LANES of a row.
constexpr int MOST_TILES = 4, ROW = MOST_TILES * LANES;
struct Block {
    Tile tiles[MOST_TILES];
    int count;

    // Number of entries of tile i before `end`.
    int seen(int i, int64_t end) const {
        return int(std::max<int64_t>(0, std::min<int64_t>(end - tiles[i].t, tiles[i].n)));
    }
};

// Rows that read the same pages in a span of a KV head: tokens of one request in the same step, or
// requests that share a prefix.  Each page is read once for all of them.
constexpr int MOST_ROWS = 16;
struct Bundle {
    int first, rows, kv_head;
    int64_t begin, ends[MOST_ROWS];  // row i attends to begin..ends[i]
    Partial mine[MOST_ROWS];
    Block following;  // the first block that is attended to after this span

    int64_t end() const { return *std::max_element(ends, ends + rows); }
};

// Blocks of up to `most` tiles of a KV head's entries before `end`, from entry t on.
template <class T>
struct Walk {
    const Decode<T>& a;
    const int32_t* table;
    int64_t t, end;
    int most;

    Walk(const Decode<T>& a, int row, int kv_head, int64_t begin, int64_t end, int most)
        : a(a), table(a.table + (size_t(row) * a.kv_heads + kv_head) * a.width), t(begin), end(end),
          most(most) {}

    Block next() {
        Block out;
        for (out.count = 0; out.count < most && t < end; ++out.count) {
            const int off = int(t % a.page);
            const int n = int(std::min<int64_t>({LANES, a.page - off, end - t}));
            out.tiles[out.count] = {t, size_t(table[t / a.page]) * a.page + off, n};
            t += n;
        }
        return out;
    }
};

// Prefetch `bytes`: pages can be anywhere in memory, so the hardware cannot predict them.
inline void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}

// Convert a row [ROW] of products of one query head with a block's entries before `end` to weights.
// If a logit is larger than all before, the head's earlier sums are scaled down.  Returns the
// block's largest logit minus the head's largest one; NEVER if no entry is attended to.
template <class T>
inline float soften(const Decode<T>& a, int request, int head, const Block& block, int64_t end,
                    float* row, Partial to, int padded_value, float* kept_logits) {
    const int64_t oldest = a.window ? a.at[request] - a.window : -1;
    const size_t at = size_t(request) * a.heads + head;
    Vec most = set1(NEVER), all = set1(0.f);
    for (int i = 0; i < block.count; ++i) {
        const int n = block.seen(i, end);
        const Tile& tile = block.tiles[i];
        float* mine = row + i * LANES;
        store(mine, logits(load(mine), a.scale, a.softcap));
        for (int e = n; e < LANES; ++e) mine[e] = NEVER;
        if (a.window)
            for (int e = 0; e < n; ++e)
                if (a.positions[tile.slot + e] <= oldest) mine[e] = NEVER;
        if (kept_logits) std::memcpy(kept_logits + at * a.longest + tile.t, mine, n * sizeof(float));
        most = max(most, load(mine));
    }
    const float best = top(most);
    if (best == NEVER) {  // no entry, or NaN
        for (int i = 0; i < block.count; ++i) all = all + load(row + i * LANES);
        if (!std::isnan(sum(all))) {
            for (int i = 0; i < block.count; ++i) store(row + i * LANES, set1(0.f));
            return NEVER;
        }
    }
    if (!(best <= *to.top)) {  // a new largest logit (or NaN)
        const float less = *to.top == NEVER ? 0.f : std::exp(*to.top - best);
        for (int d = 0; d < padded_value; d += LANES)
            store(to.values + d, load(to.values + d) * set1(less));
        store(to.sums, load(to.sums) * set1(less));
        *to.top = best;
    }
    all = load(to.sums);
    const Vec base = set1(*to.top);
    for (int i = 0; i < block.count; ++i) {
        const Vec weight = exp2((load(row + i * LANES) - base) * set1(LOG2E));
        all = all + weight;
        store(row + i * LANES, weight);
    }
    store(to.sums, all);
    return best - *to.top;
}
