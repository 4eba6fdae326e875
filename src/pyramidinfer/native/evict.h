// Evictions by a rule (Best in types.py), many layers at once: score the entries by the ring's
// queries (or by their running scores, or by position), pool over neighbours, keep the best of every
// KV head, fill the holes.
#pragma once
#include "cache.h"
#include "decode.h"
#include "matmul.h"
#include "select.h"

// One layer of one request.  pages [K, ..], `width` apart; lengths [K]; counts [K] in: how many
// entries of each head are to stay; out: how many it has.  protect [text] bytes: places that must
// stay.  rows [window] of the ring, oldest first; queries [capacity, H, D], lse [capacity, H];
// query_at [window] positions.  window 0: there is no ring; entries go by their running scores, or
// the newest are the best.
struct Eviction {
    void *keys, *values, *positions, *scores;  // the group's; scores null where there are none
    fp16 *key_scales, *value_scales;           // null where entries lie as they are
    const int32_t* pages;
    const int64_t* lengths;
    int64_t* counts;
    const uint8_t* protect;
    const void* queries;
    const float* lse;
    const int64_t *rows, *query_at;
    int64_t width, kernel, pools_max, sinks, recent, room, running, text;
    int64_t kv_heads, key_dim, value_dim, page, codec;
    int64_t window, heads, takes_max;
    float scale, softcap, share;  // share: what each weight counts in a mean

    int64_t group() const { return heads / kv_heads; }
    size_t slot(int64_t head, int64_t entry) const {
        return size_t(pages[head * width + entry / page]) * page + entry % page;
    }
    // f(first, slot, n) of every page of a head: n entries from `first` on, at `slot` and behind.
    template <class F>
    void by_page(int64_t head, F f) const {
        const int64_t length = lengths[head];
        const int32_t* mine = pages + head * width;
        for (int64_t first = 0; first < length; first += page, ++mine)
            f(first, size_t(*mine) * page, std::min(page, length - first));
    }
    // The key in a slot; room [key_dim] floats and as many of T, for one that a codec has stored.
    template <class T>
    const T* key(size_t slot, float* room) const {
        if (codec == AS_IS) return (const T*)keys + slot * key_dim;
        T* out = (T*)(room + key_dim);
        decode_entry(int(codec), (const uint8_t*)keys + slot * code_bytes(int(codec), key_dim),
                     key_scales + slot * (key_dim / group_size(key_dim)), key_dim, room, out);
        return out;
    }
};

constexpr int BLOCK_ENTRIES = 16;

// What score_entries works in: queries as panels, their log-sum-exps, keys of a block, a decoded key.
inline int64_t units_to_score(const Eviction& e, int64_t units) {
    const int64_t panels = ceil_div(e.window * e.group(), COLUMNS);
    return panels * (units + 1) * COLUMNS + BLOCK_ENTRIES * units + 1 + 2 * e.key_dim;
}

// R entries a [R][units] under W * LANES queries, the first of a panel b: totals [R] go on with what
// norms [R] (of each entry, the queries' log-sum-exps) make of the products.
template <class U, int R, int W>
inline void rate_tile(const Eviction& e, const uint32_t* a, const uint32_t* b, int units,
                      const float* const* norms, Vec* totals) {
    Vec acc[R][W];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) acc[r][w] = set1(0.f);
    const char* none = nullptr;
    tile<U>(acc, a, units, b, units, none, 0);
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) {
            const Vec x = logits(acc[r][w], e.scale, e.softcap) * set1(LOG2E) - load(norms[r] + w * LANES);
            totals[r] = e.takes_max ? max(totals[r], x) : totals[r] + exp2(x);
        }
}

// The same of n entries: as many at a time as leave room for their products in registers.
template <class U, int W>
inline void rate(const Eviction& e, const uint32_t* a, int n, const uint32_t* b, int units,
                 const float* const* norms, Vec* totals) {
    constexpr int MOST = LANES == 16 && W < 4 ? 8 : ROWS;
    int i = 0;
    for (; i + MOST <= n; i += MOST) rate_tile<U, MOST, W>(e, a + i * units, b, units, norms + i, totals + i);
    for (; i + 2 <= n; i += 2) rate_tile<U, 2, W>(e, a + i * units, b, units, norms + i, totals + i);
    if (i < n) rate_tile<U, 1, W>(e, a + i * units, b, units, norms + i, totals + i);
}

// The same for the first `columns` queries of a panel.
template <class U, int W = WIDE>
inline void rate_panel(const Eviction& e, const uint32_t* a, int n, const uint32_t* b, int64_t columns,
                       int units, const float* const* norms, Vec* totals) {
    if constexpr (W > 1)
        if (columns <= (W - 1) * LANES)
            return rate_panel<U, W - 1>(e, a, n, b, columns, units, norms, totals);
    rate<U, W>(e, a, n, b, units, norms, totals);
}

// scores [n]: the largest (or the mean) weight that any of the window's queries of the head's group
// gave each entry.  Entries are the rows of the product, so that keys are taken as they lie.
template <class T>
inline void score_entries(const Eviction& e, int64_t head, const int64_t* places, float* scores,
                          uint32_t* room) {
    using U = typename UnitOf<T>::type;
    const int units = int(ceil_div(e.key_dim, U::DEPTH)), depth = int(e.key_dim);
    const int64_t group = e.group(), rows = e.window * group;
    const int64_t panels = ceil_div(rows, COLUMNS), oldest = e.query_at[0];
    const size_t panel = size_t(units) * COLUMNS;
    float* norms = (float*)(room + panels * panel);
    auto* keys = (uint32_t*)(norms + panels * COLUMNS);
    auto* decoded = (float*)(keys + BLOCK_ENTRIES * units + 1);
    const auto at = [&](int64_t r) { return e.rows[r / group] * e.heads + head * group + r % group; };
    for (int64_t p = 0; p < panels; ++p)
        pack_keys<T>(room + p * panel, p * COLUMNS, rows, depth,
                     [&](int64_t r) { return (const T*)e.queries + at(r) * e.key_dim; });
    for (int64_t r = 0; r < panels * COLUMNS; ++r)
        norms[r] = r < rows ? e.lse[at(r)] * LOG2E : -NEVER;
    // Whether keys are units as they lie.
    const bool plain = e.codec == AS_IS && sizeof(T) == sizeof(typename U::Number) && depth % U::DEPTH == 0;
    const auto score_block = [&](int64_t first, size_t slot, int n) {
        const auto* entries = (const uint32_t*)((const T*)e.keys + slot * depth);
        if (!plain) {
            for (int i = 0; i < n; ++i)
                pack_left(keys + size_t(i) * units, e.template key<T>(slot + i, decoded), depth);
            entries = keys;
        }
        Vec totals[BLOCK_ENTRIES];  // where the largest counts, its logarithm
        for (int i = 0; i < n; ++i) totals[i] = set1(e.takes_max ? NEVER : 0.f);
        for (int64_t p = 0; p < panels; ++p) {
            const float* norm_of[BLOCK_ENTRIES];
            float own[BLOCK_ENTRIES][COLUMNS];
            for (int i = 0; i < n; ++i) {
                const int64_t place = places[first + i];
                norm_of[i] = norms + p * COLUMNS;
                if (place <= oldest) continue;
                for (int64_t c = 0, r = p * COLUMNS; c < COLUMNS; ++c, ++r)  // not every query could see it
                    own[i][c] = r < rows && place > e.query_at[r / group] ? -NEVER : norm_of[i][c];
                norm_of[i] = own[i];
            }
            rate_panel<U>(e, entries, n, room + p * panel, rows - p * COLUMNS, units, norm_of, totals);
        }
        float found[LANES * ((BLOCK_ENTRIES + LANES - 1) / LANES)] = {};
        for (int i = 0; i < n; ++i) found[i] = e.takes_max ? top(totals[i]) : sum(totals[i]) * e.share;
        if (e.takes_max)
            for (int i = 0; i < n; i += LANES) store(found + i, exp2(load(found + i)));
        std::memcpy(scores + first, found, n * sizeof(float));
    };
    const int64_t bytes = e.page * (e.codec == AS_IS ? int64_t(depth * sizeof(T))
                                                     : code_bytes(int(e.codec), depth));
    e.by_page(head, [&](int64_t first, size_t slot, int64_t some) {
        if (first + some < e.lengths[head])
            fetch((const char*)e.keys + e.slot(head, first + some) / e.page * bytes, bytes);
        for (int64_t i = 0; i < some; i += BLOCK_ENTRIES)
            score_block(first + i, slot + i, int(std::min<int64_t>(BLOCK_ENTRIES, some - i)));
    });
}

// Heads that lose nothing are not looked at.
template <class T>
inline void evict(const Eviction& e) {
    static thread_local Scratch head_room, place_room, score_room, room, kept_room;
    auto* live = head_room.get<int64_t>(3 * e.kv_heads);  // heads, their lengths, their counts
    int64_t *lengths = live + e.kv_heads, *counts = lengths + e.kv_heads, heads = 0, n = 0;
    for (int64_t head = 0; head < e.kv_heads; ++head) {
        const int64_t length = e.lengths[head];
        if (e.counts[head] >= length) {
            e.counts[head] = length;
            continue;
        }
        live[heads] = head, lengths[heads] = length, counts[heads++] = e.counts[head];
        n = std::max(n, length);
    }
    if (!heads) return;
    const int64_t units = ceil_div(e.key_dim, UnitOf<T>::type::DEPTH);
    auto* places = place_room.get<int64_t>(heads * n);
    auto* scores = score_room.get<float>(2 * heads * n);
    auto* forced = kept_room.get<uint8_t>(heads * n * (1 + sizeof(int64_t)) + 64);
    auto* indices = (int64_t*)(forced + round_up(heads * n, 64));
    auto* work = room.get<uint32_t>(e.window ? units_to_score(e, units) : 0);
    const bool pools = e.kernel > 1;
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t length = lengths[h], at = h * n;
        e.by_page(live[h], [&](int64_t first, size_t slot, int64_t some) {
            const auto* from = (const int32_t*)e.positions + slot;
            std::copy(from, from + some, places + at + first);
        });
        for (int64_t i = at; i < at + length; ++i)
            forced[i] = (places[i] < e.sinks) | (places[i] > e.recent);
        if (e.text)
            for (int64_t i = at; i < at + length; ++i)
                if (places[i] < e.text) forced[i] |= e.protect[places[i]];
        if (e.running)
            e.by_page(live[h], [&](int64_t first, size_t slot, int64_t some) {
                std::memcpy(scores + at + first, (const float*)e.scores + slot, some * sizeof(float));
            });
        else if (!e.window)
            for (int64_t i = 0; i < length; ++i) scores[at + i] = float(places[at + i] - e.recent);
        else score_entries<T>(e, live[h], places + at, scores + at, work);
        if (pools)
            pool_scores(scores + at, places + at, 0, 1, length, int(e.kernel), bool(e.pools_max),
                        scores + heads * n + at);
    }
    const int64_t row = best_of(pools ? scores + heads * n : scores, forced, places, lengths, heads, n,
                                counts, e.room, indices);
    const int codec = int(e.codec);
    const auto bytes = [&](int64_t size) {
        return codec == AS_IS ? int64_t(size * sizeof(T)) : code_bytes(codec, size);
    };
    const auto steps = [](int64_t size) { return int64_t(size / group_size(size) * sizeof(fp16)); };
    Storage tensors[6] = {{(char*)e.keys, bytes(e.key_dim)}, {(char*)e.values, bytes(e.value_dim)},
                          {(char*)e.positions, 4}};
    int64_t count = 3;
    if (e.scores) tensors[count++] = {(char*)e.scores, 4};
    if (codec != AS_IS) {
        tensors[count++] = {(char*)e.key_scales, steps(e.key_dim)};
        tensors[count++] = {(char*)e.value_scales, steps(e.value_dim)};
    }
    for (int64_t h = 0; h < heads; ++h) {
        keep_head({tensors, e.pages + live[h] * e.width, indices + h * row, count, e.page,
                   counts[h], lengths[h]});
        e.counts[live[h]] = counts[h];
    }
}

// All of them; their counts are what is left.
template <class T>
inline void evict_all(const Eviction* many, int64_t count) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) evict<T>(many[i]);
}
