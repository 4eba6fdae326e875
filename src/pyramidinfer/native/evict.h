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
    // The key in a slot; room [key_dim] floats and as many of T, for one that a codec has stored.
    template <class T>
    const T* key(size_t slot, float* room) const {
        if (codec == AS_IS) return (const T*)keys + slot * key_dim;
        T* out = (T*)(room + key_dim);
        decode_entry(int(codec), (const uint8_t*)keys + slot * code_bytes(int(codec), key_dim),
                     key_scales + slot * (key_dim / group_size(key_dim)), key_dim, room, out);
        return out;
    }
    bool stays(int64_t place) const {  // sinks, the newest, what is protected
        return place < sinks || place > recent || (place < text && protect[place]);
    }
};

constexpr int BLOCK_ENTRIES = 24;  // a multiple of a tile's rows

// What score_entries works in: queries as panels, their log-sum-exps, products, keys of a block, a
// decoded key.
inline int64_t units_to_score(const Eviction& e, int64_t units) {
    const int64_t panels = ceil_div(e.window * e.group(), COLUMNS);
    return panels * (units + 1) * COLUMNS + BLOCK_ENTRIES * (COLUMNS + units) + 1 + 2 * e.key_dim;
}

// scores [n]: the largest (or the mean) weight that any of the window's queries of the head's group
// gave each entry.  Entries are the rows of the product, so that keys are taken as they lie.
template <class T>
inline void score_entries(const Eviction& e, int64_t head, const int64_t* places, float* scores,
                          uint32_t* room) {
    using U = typename UnitOf<T>::type;
    const int units = int(ceil_div(e.key_dim, U::DEPTH)), depth = int(e.key_dim);
    const int64_t group = e.group(), rows = e.window * group, length = e.lengths[head];
    const int64_t panels = ceil_div(rows, COLUMNS), oldest = e.query_at[0];
    const size_t panel = size_t(units) * COLUMNS;
    float *norms = (float*)(room + panels * panel), *block = norms + panels * COLUMNS;
    auto* keys = (uint32_t*)(block + BLOCK_ENTRIES * COLUMNS);
    auto* decoded = (float*)(keys + BLOCK_ENTRIES * units + 1);
    const auto at = [&](int64_t r) { return e.rows[r / group] * e.heads + head * group + r % group; };
    for (int64_t p = 0; p < panels; ++p)
        pack_keys<T>(room + p * panel, p * COLUMNS, rows, depth,
                     [&](int64_t r) { return (const T*)e.queries + at(r) * e.key_dim; });
    for (int64_t r = 0; r < panels * COLUMNS; ++r)
        norms[r] = r < rows ? e.lse[at(r)] * LOG2E : -NEVER;
    for (int64_t first = 0; first < length; first += BLOCK_ENTRIES) {
        const int n = int(std::min<int64_t>(BLOCK_ENTRIES, length - first));
        Vec total[BLOCK_ENTRIES];  // where the largest counts, its logarithm
        for (int i = 0; i < n; ++i) {
            total[i] = set1(e.takes_max ? NEVER : 0.f);
            pack_left(keys + size_t(i) * units,
                      e.template key<T>(e.slot(head, first + i), decoded), depth);
        }
        for (int64_t p = 0; p < panels; ++p) {
            panel_product<U>(block, COLUMNS, false, keys, units, n, room + p * panel, units);
            for (int i = 0; i < n; ++i) {
                const int64_t place = places[first + i];
                float own[COLUMNS], *norm = norms + p * COLUMNS;
                if (place > oldest) {  // not every query could see it
                    for (int64_t c = 0, r = p * COLUMNS; c < COLUMNS; ++c, ++r)
                        own[c] = r < rows && place > e.query_at[r / group] ? -NEVER : norm[c];
                    norm = own;
                }
                for (int w = 0; w < COLUMNS; w += LANES) {
                    const Vec raw = logits(load(block + i * COLUMNS + w), e.scale, e.softcap);
                    const Vec x = raw * set1(LOG2E) - load(norm + w);
                    total[i] = e.takes_max ? max(total[i], x) : total[i] + exp2(x);
                }
            }
        }
        float found[LANES * ((BLOCK_ENTRIES + LANES - 1) / LANES)] = {};
        for (int i = 0; i < n; ++i) found[i] = e.takes_max ? top(total[i]) : sum(total[i]) * e.share;
        if (e.takes_max)
            for (int i = 0; i < n; i += LANES) store(found + i, exp2(load(found + i)));
        std::memcpy(scores + first, found, n * sizeof(float));
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
    auto* work = room.get<uint32_t>(e.window ? units_to_score(e, units) : 0);
    const bool pools = e.kernel > 1;
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t length = lengths[h], at = h * n;
        for (int64_t i = 0; i < length; ++i) {
            places[at + i] = ((const int32_t*)e.positions)[e.slot(live[h], i)];
            forced[at + i] = e.stays(places[at + i]);
        }
        if (e.running)
            for (int64_t i = 0; i < length; ++i)
                scores[at + i] = ((const float*)e.scores)[e.slot(live[h], i)];
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
