// An eviction whose rule is said beforehand, many layers at once: score the entries by the ring's
// queries, pool over neighbours, keep the best of every KV head, fill the holes.
#pragma once
#include "cache.h"
#include "decode.h"
#include "matmul.h"
#include "select.h"

// One layer of one request.  pages [K, ..], `width` apart; lengths [K]; rows [window] of the ring,
// oldest first; queries [capacity, H, D], lse [capacity, H]; query_at [window] positions.
// protect [text] bytes: places that must stay.
struct Eviction {
    void *keys, *values, *positions, *scores;  // the group's; scores null where there are none
    const int32_t* pages;
    const void* queries;
    const float* lse;
    const int64_t *rows, *query_at;
    const uint8_t* protect;
    const int64_t* lengths;
    int64_t window, width, count, kernel, pools_max, takes_max, sinks, recent, text;
    int64_t heads, kv_heads, key_dim, value_dim, page;
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

// kept [K]: how many entries each head keeps.
template <class T>
inline void evict(const Eviction& e, int64_t* kept) {
    static thread_local Scratch place_room, score_room, room, kept_room;
    const int64_t n = *std::max_element(e.lengths, e.lengths + e.kv_heads), units = ceil_div(e.key_dim, UnitOf<T>::type::DEPTH);
    auto* places = place_room.get<int64_t>(e.kv_heads * n);
    auto* scores = score_room.get<float>(2 * e.kv_heads * n);
    auto* forced = kept_room.get<uint8_t>(e.kv_heads * n * (1 + sizeof(int64_t)) + 64);
    auto* indices = (int64_t*)(forced + round_up(e.kv_heads * n, 64));
    auto* work = room.get<uint32_t>(e.window * e.group() * (units + COLUMNS) + units * COLUMNS + 64);
    for (int64_t head = 0; head < e.kv_heads; ++head) {
        int64_t* mine = places + head * n;
        for (int64_t i = 0; i < e.lengths[head]; ++i) {
            mine[i] = ((const int32_t*)e.positions)[e.slot(head, i)];
            forced[head * n + i] = e.stays(mine[i]);
        }
        for (int64_t i = e.lengths[head]; i < n; ++i) {  // behind a shorter head's entries
            mine[i] = -1 - i, forced[head * n + i] = 0, scores[head * n + i] = 0.f;
        }
        score_entries<T>(e, head, mine, scores + head * n, work);
    }
    float* pooled = scores;
    if (e.kernel > 1) {
        pooled = scores + e.kv_heads * n;
        pool_scores(scores, places, n, e.kv_heads, n, int(e.kernel), bool(e.pools_max), pooled);
    }
    std::fill(kept, kept + e.kv_heads, e.count);
    const int64_t row = best_of(pooled, forced, places, e.lengths, e.kv_heads, n, kept, indices);
    const Storage tensors[] = {{(char*)e.keys, int64_t(e.key_dim * sizeof(T))},
                               {(char*)e.values, int64_t(e.value_dim * sizeof(T))},
                               {(char*)e.positions, 4}, {(char*)e.scores, 4}};
    for (int64_t head = 0; head < e.kv_heads; ++head)
        keep_head({tensors, e.pages + head * e.width, indices + head * row, e.scores ? 4 : 3, e.page,
                   kept[head], e.lengths[head]});
}

// All of them; kept [count, K] entries are left.
template <class T>
inline void evict_all(const Eviction* many, int64_t count, int64_t* kept) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) evict<T>(many[i], kept + i * many[i].kv_heads);
}
