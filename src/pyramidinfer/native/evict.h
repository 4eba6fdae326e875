// An eviction whose rule is said beforehand, many layers at once: score the entries by the ring's
// queries and pool over neighbours (or go by position), keep the best of every KV head, fill the
// holes.
#pragma once
#include "cache.h"
#include "decode.h"
#include "matmul.h"
#include "select.h"

// One layer of one request.  pages [K, ..], `width` apart; lengths [K]; counts [K] in: how many
// entries of each head are to stay; out: how many it has.  protect [text] bytes: places that must
// stay.  rows [window] of the ring, oldest first; queries [capacity, H, D], lse [capacity, H];
// query_at [window] positions.  window 0: the newest are the best, and there is no ring.
struct Eviction {
    void *keys, *values, *positions, *scores;  // the group's; scores null where there are none
    const int32_t* pages;
    const int64_t* lengths;
    int64_t* counts;
    const uint8_t* protect;
    const void* queries;
    const float* lse;
    const int64_t *rows, *query_at;
    int64_t width, kernel, pools_max, sinks, recent, text, kv_heads, key_dim, value_dim, page;
    int64_t window, heads, takes_max;
    float scale, softcap, share;  // share: what each weight counts in a mean

    int64_t group() const { return heads / kv_heads; }
    size_t slot(int64_t head, int64_t entry) const {
        return size_t(pages[head * width + entry / page]) * page + entry % page;
    }
    bool stays(int64_t place) const {  // sinks, the newest, what is protected
        return place < sinks || place > recent || (place < text && protect[place]);
    }
};

// scores [n]: the largest (or the mean) weight that any of the window's queries of the head's group
// gave each entry; `room` holds the queries, one panel of keys and its products.
template <class T>
inline void score_entries(const Eviction& e, int64_t head, const int64_t* places, float* scores,
                          uint32_t* room) {
    using U = typename UnitOf<T>::type;
    const int units = int(ceil_div(e.key_dim, U::DEPTH)), rows = int(e.window * e.group());
    uint32_t *left = room, *panel = left + size_t(rows) * units + 1;
    float* block = (float*)(panel + size_t(units) * COLUMNS);
    for (int r = 0; r < rows; ++r) {
        const int64_t at = e.rows[r / e.group()] * e.heads + head * e.group() + r % e.group();
        pack_left(left + size_t(r) * units, (const T*)e.queries + at * e.key_dim, int(e.key_dim));
    }
    const int64_t length = e.lengths[head];
    for (int64_t column = 0; column < length; column += COLUMNS) {
        const int n = int(std::min<int64_t>(COLUMNS, length - column));
        pack_keys<T>(panel, column, length, int(e.key_dim), [&](int64_t entry) {
            return (const T*)e.keys + e.slot(head, entry) * e.key_dim;
        });
        panel_product<U>(block, COLUMNS, false, left, units, rows, panel, units);
        const int64_t newest = *std::max_element(places + column, places + column + n);
        Vec total[WIDE];
        for (Vec& each : total) each = set1(0.f);
        for (int r = 0; r < rows; ++r) {
            const int64_t row = e.rows[r / e.group()], at = e.query_at[r / e.group()];
            const Vec norm = set1(e.lse[row * e.heads + head * e.group() + r % e.group()] * LOG2E);
            float* products = block + r * COLUMNS;
            for (int w = 0; w < WIDE; ++w) {
                const Vec x = logits(load(products + w * LANES), e.scale, e.softcap);
                store(products + w * LANES, exp2(x * set1(LOG2E) - norm));
            }
            if (newest > at)
                for (int c = 0; c < n; ++c)
                    if (places[column + c] > at) products[c] = 0.f;
            for (int w = 0; w < WIDE; ++w) {
                const Vec x = load(products + w * LANES);
                total[w] = e.takes_max ? max(total[w], x) : total[w] + x;
            }
        }
        for (int w = 0; w < WIDE; ++w) store(block + w * LANES, e.takes_max ? total[w] : total[w] * set1(e.share));
        std::memcpy(scores + column, block, n * sizeof(float));
    }
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
    auto* work = room.get<uint32_t>(e.window ? e.window * e.group() * (units + COLUMNS) + units * COLUMNS + 64 : 0);
    const bool pools = e.window && e.kernel > 1;
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t length = lengths[h], at = h * n;
        for (int64_t i = 0; i < length; ++i) {
            places[at + i] = ((const int32_t*)e.positions)[e.slot(live[h], i)];
            forced[at + i] = e.stays(places[at + i]);
        }
        if (!e.window)
            for (int64_t i = 0; i < length; ++i) scores[at + i] = float(places[at + i]);
        else score_entries<T>(e, live[h], places + at, scores + at, work);
        if (pools)
            pool_scores(scores + at, places + at, 0, 1, length, int(e.kernel), bool(e.pools_max),
                        scores + heads * n + at);
    }
    const int64_t row = best_of(pools ? scores + heads * n : scores, forced, places, lengths, heads, n, counts, indices);
    const Storage tensors[] = {{(char*)e.keys, int64_t(e.key_dim * sizeof(T))},
                               {(char*)e.values, int64_t(e.value_dim * sizeof(T))},
                               {(char*)e.positions, 4}, {(char*)e.scores, 4}};
    for (int64_t h = 0; h < heads; ++h) {
        keep_head({tensors, e.pages + live[h] * e.width, indices + h * row, e.scores ? 4 : 3, e.page,
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
