// Decode attention: one query per request over its pages, every key read once per group of heads.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "coded.h"
#include "matmul.h"
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
    int64_t longest, window;  // window: positions a query sees back, 0 for all
    float scale, softcap;     // softcap 0: none

    int group() const { return heads / kv_heads; }
};

// softcap(x * scale) in place of raw products.
inline Vec logits(Vec x, float scale, float softcap) {
    x = x * set1(scale);
    if (softcap == 0.f) return x;
    const Vec y = x * set1(2.f * LOG2E / softcap);  // tanh(z) = 1 - 2 / (1 + e^2z)
    return set1(softcap) * (set1(1.f) - set1(2.f) / (set1(1.f) + exp2(y)));
}

// What one span of entries gives a group's heads: [G][padded V] values, [G] tops, [G][LANES] sums.
struct Partial {
    float *values, *top, *sums;
};

// Whose entries are attended to: a request and one of its KV heads.
struct Reader {
    int request, kv_head;
};

// Products `row` of n <= LANES entries from entry t on, at `slot` of the storage, with one head's
// query become weights; what was summed of the head before shrinks where there is a new top.  How far
// below the top the largest weight is, NEVER where nothing is seen.
template <class T>
inline float soften(const Decode<T>& a, Reader by, int head, int64_t t, size_t slot, int n, float* row,
                    Partial to, int padded_value, float* kept_logits) {
    const int64_t oldest = a.window ? a.at[by.request] - a.window : -1;
    store(row, logits(load(row), a.scale, a.softcap));
    for (int e = n; e < LANES; ++e) row[e] = NEVER;
    if (a.window)
        for (int e = 0; e < n; ++e)
            if (a.positions[slot + e] <= oldest) row[e] = NEVER;
    if (kept_logits) {
        const size_t at = size_t(by.request) * a.heads + by.kv_head * a.group() + head;
        std::memcpy(kept_logits + at * a.longest + t, row, n * sizeof(float));
    }
    const float best = top(load(row));
    if (best == NEVER && !std::isnan(sum(load(row)))) {
        store(row, set1(0.f));
        return NEVER;
    }
    if (!(best <= *to.top)) {  // a new top (or NaN)
        const float less = *to.top == NEVER ? 0.f : std::exp(*to.top - best);
        for (int d = 0; d < padded_value; d += LANES)
            store(to.values + d, load(to.values + d) * set1(less));
        store(to.sums, load(to.sums) * set1(less));
        *to.top = best;
    }
    const Vec weight = exp2((load(row) - set1(*to.top)) * set1(LOG2E));
    store(to.sums, load(to.sums) + weight);
    store(row, weight);
    return best - *to.top;
}

// The part of one head.
inline Partial of_head(Partial all, int head, int padded_value) {
    return {all.values + head * padded_value, all.top + head, all.sums + head * LANES};
}

// A tile of n <= LANES entries for G heads of the group from g0 on.
template <int G, class T, class Tile>
inline void attend_tile(const Decode<T>& a, const Tile& tile, Reader by, int g0, int64_t t, size_t slot,
                        int n, Partial to, float* kept_logits) {
    float weights[G * LANES], peaks[G];
    const int padded_value = tile.shape.padded_value;
    tile.template products<G>(weights, g0);
    for (int g = 0; g < G; ++g) {
        const float below = soften(a, by, g0 + g, t, slot, n, weights + g * LANES,
                                   of_head(to, g, padded_value), padded_value, kept_logits);
        peaks[g] = below == NEVER ? 0.f : Tile::peak(below);
    }
    tile.template weigh<G>(to.values, weights, peaks);
}

// A tile for all heads of a KV head, four at a time.
template <class T, class Tile>
inline void attend_group(const Decode<T>& a, const Tile& tile, Reader by, int64_t t, size_t slot, int n,
                         Partial to, float* kept_logits) {
    const int group = a.group();
    for (int g = 0; g < group; g += 4) {
        const Partial part{to.values + g * tile.shape.padded_value, to.top + g, to.sums + g * LANES};
#define HEADS(G) attend_tile<G>(a, tile, by, g, t, slot, n, part, kept_logits)
        switch (std::min(4, group - g)) {
            case 1: HEADS(1); break;
            case 2: HEADS(2); break;
            case 3: HEADS(3); break;
            default: HEADS(4); break;
        }
#undef HEADS
    }
}

// Have memory bring `bytes` close; pages lie anywhere, so no hardware can foresee them.
inline void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}

// Rows that read the same pages in a span of a KV head: tokens of one request that are fed together,
// or requests that share a prefix.  Each page is read once for all of them.
constexpr int MOST_ROWS = 16;
struct Bundle {
    int first, rows, kv_head;
    int64_t begin, ends[MOST_ROWS];  // row i attends to begin..ends[i]
    Partial mine[MOST_ROWS];

    Reader reader(int i) const { return {first + i, kv_head}; }
};

// The tiles of a bundle: visit(t, slot, n) for each n <= LANES entries from entry t on.
template <class T, class Visit>
inline void for_each_tile(const Decode<T>& a, const Bundle& b, Visit visit) {
    const int64_t end = *std::max_element(b.ends, b.ends + b.rows);
    const int last = b.first + b.rows - 1;  // its pages are all others' too
    const int32_t* table = a.table + (size_t(last) * a.kv_heads + b.kv_head) * a.width;
    const auto bytes = [&](int64_t size) {
        return a.page * (a.codec == AS_IS ? int64_t(size * sizeof(T)) : code_bytes(a.codec, size));
    };
    const int64_t key_bytes = bytes(a.key_dim), value_bytes = bytes(a.value_dim);
    const auto steps = [&](int64_t size) { return a.page * (size / group_size(size)); };
    for (int64_t t = b.begin; t < end; t += a.page) {
        const size_t page = table[t / a.page];
        const size_t next = t + a.page < end ? table[t / a.page + 1] : page;
        fetch((const char*)a.keys + next * key_bytes, key_bytes);
        fetch((const char*)a.values + next * value_bytes, value_bytes);
        if (a.codec != AS_IS) {
            fetch(a.key_scales + next * steps(a.key_dim), steps(a.key_dim) * sizeof(fp16));
            fetch(a.value_scales + next * steps(a.value_dim), steps(a.value_dim) * sizeof(fp16));
        }
        for (int off = 0; off < a.page && t + off < end; off += LANES)
            visit(t + off, page * a.page + off, int(std::min<int64_t>({LANES, a.page - off, end - t - off})));
    }
}

// All entries of a bundle.  enter(slot, n) makes the tile of the n entries there ready, tile_at(i, slot,
// n) gives it to row i with the first n of them.
template <class T, class Enter, class At>
inline void attend_span(const Decode<T>& a, const Bundle& b, float* kept_logits, Enter enter, At tile_at) {
    for_each_tile(a, b, [&](int64_t t, size_t slot, int most) {
        enter(slot, most);
        for (int i = 0; i < b.rows; ++i) {
            const int n = int(std::min<int64_t>(most, b.ends[i] - t));
            if (n > 0) attend_group(a, tile_at(i, slot, n), b.reader(i), t, slot, n, b.mine[i], kept_logits);
        }
    });
}

#ifdef PAIRS
// Calls f(std::integral_constant<int, count>) for up to four of something.
template <class F>
inline void with_count(int count, F f) {
    switch (count) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        default: return f(std::integral_constant<int, 4>());
    }
}

// attend_span for several rows of pairs: their heads share the work of putting keys in columns, and
// get the sums they have alone.
template <int STEPS>
inline void attend_pairs(const Decode<bf16>& a, Shape shape, const Bundle& b, float* kept_logits) {
    static thread_local Scratch columns_room;
    constexpr int size = STEPS * 32, AT_ONCE = 4;
    const int heads = b.rows * shape.group;
    float* weights = columns_room.get<float>(16 * size / 2 + heads * LANES);
    auto* columns = (uint32_t*)(weights + heads * LANES);
    const bf16 *keys = (const bf16*)a.keys, *values = (const bf16*)a.values;
    const bf16* raw[AT_ONCE];
    float *rows[AT_ONCE], *to[AT_ONCE];
    for_each_tile(a, b, [&](int64_t t, size_t slot, int most) {
        pairs_in_columns<STEPS>(columns, keys + slot * size, most);
        for (int h = 0; h < heads; h += AT_ONCE) {
            const int count = std::min(AT_ONCE, heads - h);
            for (int g = 0; g < count; ++g) {
                const int head = b.kv_head * shape.group + (h + g) % shape.group;
                raw[g] = a.queries + size_t((b.first + (h + g) / shape.group) * a.heads + head) * size;
                rows[g] = weights + (h + g) * LANES;
            }
            with_count(count, [&](auto c) { products_of_columns<c.value, STEPS>(rows, raw, columns); });
        }
        const auto seen = [&](int i) { return int(std::min<int64_t>(most, b.ends[i] - t)); };
        for (int h = 0; h < heads; ++h) {
            const int i = h / shape.group, g = h % shape.group, n = seen(i);
            if (n > 0)
                soften(a, b.reader(i), g, t, slot, n, weights + h * LANES,
                       of_head(b.mine[i], g, shape.padded_value), shape.padded_value, kept_logits);
        }
        for (int h = 0; h < heads;) {
            const int n = seen(h / shape.group);
            int count = 0;
            while (count < AT_ONCE && h + count < heads && seen((h + count) / shape.group) == n) ++count;
            for (int g = 0; g < count; ++g) {
                const int head = h + g;
                rows[g] = weights + head * LANES;
                to[g] = b.mine[head / shape.group].values + head % shape.group * shape.padded_value;
            }
            if (n > 0)
                with_count(count, [&](auto c) {
                    weigh_pairs<c.value>(to, rows, values + slot * a.value_dim, n, a.value_dim);
                });
            h += count;
        }
    });
}

// Whether rows of pairs are attended to together; if so it is done.
inline bool attend_rows(const Decode<bf16>& a, Shape shape, const Bundle& b, float* kept_logits) {
    if (b.rows < 2 || !takes_pairs<bf16>(a.key_dim) || !is_interleaved<bf16>(a.value_dim)) return false;
    if (a.key_dim == 64) attend_pairs<2>(a, shape, b, kept_logits);
    else if (a.key_dim == 96) attend_pairs<3>(a, shape, b, kept_logits);
    else attend_pairs<4>(a, shape, b, kept_logits);
    return true;
}
#endif
template <class T>
inline bool attend_rows(const Decode<T>&, Shape, const Bundle&, float*) {
    return false;
}

// A span of entries that a codec has stored: queries [rows][group][padded D] are rotated as the keys
// are, and so the sums of values stay.
template <class T>
inline void attend_coded(const Decode<T>& a, Shape shape, const Bundle& bundle, float* queries,
                         float* kept_logits) {
    static thread_local Scratch packed, tiles;
    const int heads = bundle.rows * shape.group;  // of all rows
    for (int h = 0; h < heads; ++h) rotate_groups(queries + h * shape.padded_key, a.key_dim);
    const auto *keys = (const uint8_t*)a.keys, *values = (const uint8_t*)a.values;
    const int64_t key_row = code_bytes(a.codec, a.key_dim), value_row = code_bytes(a.codec, a.value_dim);
    const int64_t key_groups = a.key_dim / group_size(a.key_dim);
    const int64_t value_groups = a.value_dim / group_size(a.value_dim);
#ifdef INTEGER_TILES
    if (takes_integers(a.codec, shape)) {
        auto* integers = packed.get<IntegerQuery>(heads * key_groups);
        const auto attend = [&](auto tile) {
            for (int h = 0; h < heads; ++h)
                for (int b = 0; b < key_groups; ++b)
                    integers[h * key_groups + b].set(queries + h * shape.padded_key + b * 64,
                                                     tile.QUERY_MOST);
            const auto enter = [&](size_t slot, int) {
                tile.keys = keys + slot * key_row, tile.values = values + slot * value_row;
                tile.key_scales = a.key_scales + slot * key_groups;
                tile.value_scales = a.value_scales + slot * value_groups;
            };
            attend_span(a, bundle, kept_logits, enter, [&](int i, size_t, int n) {
                tile.queries = integers + i * shape.group * key_groups;
                tile.n = n;
                return tile;
            });
        };
        if (a.codec == INT8) attend(IntegerTile<INT8>{shape, integers});
        else attend(IntegerTile<INT4>{shape, integers});
        return;
    }
#endif
    // Others as numbers: of T where those are multiplied in pairs and lose nothing that eight bits
    // have, else as floats.
    using N = std::conditional_t<UnitOf<T>::type::DEPTH == 2, T, float>;
    const size_t entry = size_t(a.key_dim) + a.value_dim;
    N* wide_keys = tiles.get<N>(LANES * entry + heads * a.key_dim);
    N *wide_values = wide_keys + LANES * a.key_dim, *rotated = wide_keys + LANES * entry;
    for (int h = 0; h < heads; ++h)
        for (int d = 0; d < a.key_dim; ++d)
            from_float(queries[h * shape.padded_key + d], rotated[h * a.key_dim + d]);
    const auto enter = [&](size_t slot, int n) {
        for (int e = 0; e < n; ++e) {
            const size_t at = slot + e;
            decode_rotated(a.codec, keys + at * key_row, a.key_scales + at * key_groups, a.key_dim,
                           wide_keys + e * a.key_dim);
            decode_rotated(a.codec, values + at * value_row, a.value_scales + at * value_groups,
                           a.value_dim, wide_values + e * a.value_dim);
        }
    };
    attend_span(a, bundle, kept_logits, enter, [&](int i, size_t, int n) {
        return PlainTile<N>{shape, queries + i * shape.group * shape.padded_key,
                            rotated + i * shape.group * a.key_dim, wide_keys, wide_values, n};
    });
}

// How the work is cut: every KV head's entries into spans, so that a long head is shared by all
// cores.  Spans go by a head's own length alone, so a request's outputs do not depend on who else
// is there.
struct Cut {
    int spans, size;  // size: entries of a span
};
constexpr int SPAN = 256;

// How many rows from `row` on read the same pages as it between entries begin and end of a KV head,
// 0 where the row before it does and counts it in.  Rows with nothing there are nobody's.
template <class T>
inline int rows_together(const Decode<T>& a, int row, int kv_head, int64_t begin, int64_t end) {
    const auto at = [&](int r) { return size_t(r) * a.kv_heads + kv_head; };
    const auto used = [&](int r) { return std::min(a.lengths[at(r)], end); };
    const auto pages = [&](int r) { return ceil_div(used(r), a.page) - begin / a.page; };
    const auto continues = [&](int r) {  // all pages of the row before it are its own too
        const int64_t count = pages(r - 1);
        if (count <= 0 || pages(r) < count) return false;
        const int32_t* mine = a.table + at(r) * a.width + begin / a.page;
        const int32_t* before = a.table + at(r - 1) * a.width + begin / a.page;
        return std::memcmp(mine, before, count * sizeof(int32_t)) == 0;
    };
    if (used(row) <= begin) return 0;
    int start = row;
    while (start > 0 && continues(start)) --start;
    if ((row - start) % MOST_ROWS) return 0;
    int rows = 1;
    while (rows < MOST_ROWS && row + rows < a.requests && continues(row + rows)) ++rows;
    return rows;
}

// To be called by all threads of a parallel region; `room` comes from decode_room.
template <class T>
inline void decode(const Decode<T>& a, Cut cut, float* room, float* kept_logits) {
    const int group = a.group(), spans = cut.spans;
    const int padded_key = int(round_up(a.key_dim, LANES)), padded_value = int(round_up(a.value_dim, LANES));
    const Shape shape{group, a.key_dim, a.value_dim, padded_key, padded_value};
    const size_t each = size_t(group) * (padded_value + 2);
    const int tasks = a.requests * a.kv_heads * spans;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
        static thread_local Scratch widened;
        const int span = task % spans, head = task / spans;
        Bundle bundle{head / a.kv_heads, 0, head % a.kv_heads, int64_t(span) * cut.size, {}, {}};
        bundle.rows = rows_together(a, bundle.first, bundle.kv_head, bundle.begin, bundle.begin + cut.size);
        if (!bundle.rows) continue;
        float* queries = widened.get<float>(size_t(bundle.rows) * group * (padded_key + LANES));
        float* sums = queries + size_t(bundle.rows) * group * padded_key;
        const auto raw = [&](int i) {
            return a.queries + size_t((bundle.first + i) * a.heads + bundle.kv_head * group) * a.key_dim;
        };
        for (int i = 0; i < bundle.rows; ++i) {
            const size_t own = size_t(bundle.first + i) * a.kv_heads + bundle.kv_head;
            bundle.ends[i] = std::min(a.lengths[own], bundle.begin + cut.size);
            if (a.codec != AS_IS || !takes_pairs<T>(a.key_dim))
                widen(queries + i * group * padded_key, raw(i), group, a.key_dim, padded_key);
            float* values = room + (own * spans + span) * each;
            float* top = values + size_t(group) * padded_value;
            bundle.mine[i] = {values, top, sums + size_t(i) * group * LANES};
            std::fill(values, top, 0.f);
            std::fill(top, top + group, NEVER);
            std::fill(bundle.mine[i].sums, bundle.mine[i].sums + group * LANES, 0.f);
        }
        const auto *keys = (const T*)a.keys, *values_at = (const T*)a.values;
        if (a.codec != AS_IS) attend_coded(a, shape, bundle, queries, kept_logits);
        else if (!attend_rows(a, shape, bundle, kept_logits))
            attend_span(a, bundle, kept_logits, [](size_t, int) {}, [&](int i, size_t slot, int n) {
                return PlainTile<T>{shape, queries + i * group * padded_key, raw(i),
                                    keys + slot * a.key_dim, values_at + slot * a.value_dim, n};
            });
        for (int i = 0; i < bundle.rows; ++i)
            for (int g = 0; g < group; ++g) {
                const Partial& mine = bundle.mine[i];
                mine.top[group + g] = sum(load(mine.sums + g * LANES));
            }
    }
#pragma omp for schedule(static)
    for (int task = 0; task < a.requests * a.heads; ++task) {
        static thread_local Scratch unmixed;
        const int head = task % a.heads, r = task / a.heads, kv_head = head / group, g = head % group;
        const float* first = room + size_t(r * a.kv_heads + kv_head) * spans * each;
        const size_t top_at = size_t(group) * padded_value + g, sum_at = top_at + group;
        const int used = int(ceil_div(a.lengths[r * a.kv_heads + kv_head], cut.size));
        float best = NEVER, total = 0.f;
        for (int s = 0; s < used; ++s) best = std::max(best, first[s * each + top_at]);
        for (int s = 0; s < used; ++s) {
            const float held = first[s * each + top_at];
            if (held != NEVER) total += first[s * each + sum_at] * std::exp(held - best);
        }
        if (a.lse) a.lse[task] = best + std::log(total);
        T* out = a.out + size_t(task) * a.value_dim;
        const bool mixed = !takes_integers(a.codec, shape) && is_interleaved<T>(a.value_dim);
        float* plain = a.codec == AS_IS ? nullptr : unmixed.get<float>(padded_value);
        for (int d = 0; d < a.value_dim; d += LANES) {
            Vec acc = set1(0.f);
            for (int s = 0; s < used; ++s) {
                const float held = first[s * each + top_at];
                if (held == NEVER) continue;
                const Vec share = set1(std::exp(held - best) / total);
                const float* from = first + s * each + size_t(g) * padded_value;
                acc = fma(mixed ? in_order(from + d / 32 * 32, d / 16 % 2) : load(from + d), share, acc);
            }
            if (plain) store(plain + d, acc);
            else store_at(out, acc, d, a.value_dim);
        }
        if (!plain) continue;
        if (takes_integers(a.codec, shape)) integers_in_order(plain, a.value_dim);
        rotate_groups(plain, a.value_dim);
        for (int d = 0; d < a.value_dim; d += LANES) store_at(out, load(plain + d), d, a.value_dim);
    }
    if (!a.probs) return;
#pragma omp for schedule(static)
    for (int task = 0; task < a.requests * a.kv_heads; ++task) {
        const int kv_head = task % a.kv_heads, r = task / a.kv_heads;
        float* probs = a.probs + size_t(task) * a.longest;
        const size_t head = size_t(r) * a.heads + kv_head * group;
        std::fill(probs, probs + a.longest, 0.f);
        for (int g = 0; g < group; ++g)
            for (int64_t t = 0; t < a.lengths[task]; ++t)
                probs[t] += std::exp(kept_logits[(head + g) * a.longest + t] - a.lse[head + g]);
    }
}

// The cut, and the floats of working room it needs.
template <class T>
inline Cut decode_cut(const Decode<T>& a) {
    const int size = int(round_up(SPAN, a.page));
    return {int(std::max<int64_t>(1, ceil_div(a.longest, size))), size};
}
template <class T>
inline size_t decode_room(const Decode<T>& a, Cut cut) {
    const size_t each = size_t(a.group()) * (round_up(a.value_dim, LANES) + 2);
    return size_t(a.requests) * a.kv_heads * cut.spans * each;
}
