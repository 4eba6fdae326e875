// Decode attention: one query per request over its pages; every key is read once per group of heads.
#pragma once
#include <omp.h>

#include "coded.h"

// Attend to all entries of a bundle for all heads of its rows.  Results equal those of each row alone.
template <class T, class Kind>
inline void attend(const Decode<T>& a, Shape shape, const Bundle& b, Kind& kind, float* kept_logits) {
    static thread_local Scratch room;
    const int heads = b.rows * shape.group;
    float *rows = room.get<float>(size_t(heads) * (ROW + 1)), *below = rows + size_t(heads) * ROW;
    // The last row has the pages of all other rows.
    Walk<T> walk(a, b.first + b.rows - 1, b.kv_head, b.begin, b.end(), Kind::TILES);
    for (Block block = walk.next(), next; block.count; block = next) {
        next = walk.next();
        kind.enter(block, next.count ? next : b.following);
        for (int h = 0; h < heads; h += 4)
            with_count(std::min(4, heads - h), [&](auto c) {
                kind.template products<c.value>(rows + size_t(h) * ROW, h);
            });
        const Tile& last = block.tiles[block.count - 1];
        const auto end = [&](int i) { return std::min<int64_t>(b.ends[i], last.t + last.n); };
        for (int i = 0, h = 0; i < b.rows; ++i)
            for (int g = 0; g < shape.group; ++g, ++h)
                below[h] = soften(a, b.first + i, b.kv_head * shape.group + g, block, end(i), rows + size_t(h) * ROW,
                                  of_head(b.mine[i], g, shape.padded_value), shape.padded_value, kept_logits);
        for (int h = 0; h < heads;) {
            const int64_t seen_to = end(h / shape.group);
            int n[MOST_TILES], count = 0;
            float *to[4], *weights[4];
            for (int i = 0; i < block.count; ++i) n[i] = block.seen(i, seen_to);
            for (; count < 4 && h + count < heads && end((h + count) / shape.group) == seen_to; ++count) {
                const int row = (h + count) / shape.group, g = (h + count) % shape.group;
                weights[count] = rows + size_t(h + count) * ROW;
                to[count] = b.mine[row].values + g * shape.padded_value;
            }
            if (n[0] > 0)
                with_count(count, [&](auto c) { kind.template weigh<c.value>(to, weights, below + h, n); });
            h += count;
        }
    }
}

// The same for numbers from a source: queries [heads][D]; wide: as floats [heads][padded D].
template <class N, class T, class Source>
inline void attend_numbers(const Decode<T>& a, Shape shape, const Bundle& b, const Source& source,
                           const N* queries, const float* wide, float* kept_logits) {
#ifdef PAIRS
    if constexpr (std::is_same_v<N, bf16>)
        if (takes_pairs<N>(a.key_dim, a.value_dim)) {
            static thread_local Scratch room;
            const int heads = b.rows * shape.group;
            PairBlock<Source> block{shape, source, room.get<uint32_t>(size_t(heads) * a.key_dim * 2)};
            for (int h = 0; h < heads; ++h) block.set(h, queries + size_t(h) * a.key_dim);
            return attend(a, shape, b, block, kept_logits);
        }
#endif
    FloatBlock<N, Source> block{shape, source, wide};
    attend(a, shape, b, block, kept_logits);
}

// The same for entries stored by a codec: queries [heads][padded D] are rotated like the keys, and
// the sums of values remain rotated.
template <class T>
inline void attend_coded(const Decode<T>& a, Shape shape, const Bundle& b, float* queries,
                         float* kept_logits) {
    static thread_local Scratch packed, room;
    const int heads = b.rows * shape.group;  // of all rows
    for (int h = 0; h < heads; ++h) rotate_groups(queries + h * shape.padded_key, a.key_dim);
    const auto *keys = (const uint8_t*)a.keys, *values = (const uint8_t*)a.values;
#ifdef INTEGER_BLOCKS
    if (takes_integers(a.codec, shape)) {
        const auto run = [&](auto block) {
            for (int h = 0; h < heads; ++h) block.set(h, queries + h * shape.padded_key);
            attend(a, shape, b, block, kept_logits);
        };
        auto* integers = packed.get<IntegerQuery>(heads * (a.key_dim / 64));
        if (a.codec == INT8)
            run(IntegerBlock<INT8>{shape, integers, keys, values, a.key_scales, a.value_scales});
        else run(IntegerBlock<INT4>{shape, integers, keys, values, a.key_scales, a.value_scales});
        return;
    }
#endif
    // Otherwise codes are decoded to numbers: to T if T is multiplied in pairs (it represents 8-bit
    // codes without loss), else to floats.
    using N = std::conditional_t<UnitOf<T>::type::DEPTH == 2, T, float>;
    const size_t wide = size_t(MOST_TILES) * LANES * (a.key_dim + a.value_dim);
    N *decoded = room.get<N>(wide + size_t(heads) * a.key_dim), *rotated = decoded + wide;
    for (int h = 0; h < heads; ++h)
        for (int d = 0; d < a.key_dim; ++d)
            from_float(queries[h * shape.padded_key + d], rotated[h * a.key_dim + d]);
    const Decoded<N> source{keys, values, a.key_scales, a.value_scales, a.codec, a.key_dim, a.value_dim, decoded};
    attend_numbers(a, shape, b, source, rotated, queries, kept_logits);
}

// How the work is split: each KV head's entries are cut into spans, so that all cores share a long
// head.  Spans depend only on the head's own length, so a request's outputs do not depend on other
// requests.
struct Cut {
    int spans, size;  // size: entries per span
};
constexpr int SPAN = 256;

// Number of rows, starting at `row`, that read the same pages between entries begin and end of a KV
// head; 0 if an earlier row's bundle includes this row, or if the row has no entries there.
template <class T>
inline int rows_together(const Decode<T>& a, int row, int kv_head, int64_t begin, int64_t end) {
    const auto at = [&](int r) { return size_t(r) * a.kv_heads + kv_head; };
    const auto used = [&](int r) { return std::min(a.lengths[at(r)], end); };
    const auto pages = [&](int r) { return ceil_div(used(r), a.page) - begin / a.page; };
    const auto continues = [&](int r) {  // it has all pages of the row before it
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

// The first block of the next span after `task` that has entries.
template <class T>
inline Block first_after(const Decode<T>& a, Cut cut, int task, int tasks) {
    while (++task < tasks) {
        const int64_t begin = int64_t(task % cut.spans) * cut.size;
        const int row = task / cut.spans / a.kv_heads, kv_head = task / cut.spans % a.kv_heads;
        const int64_t length = a.lengths[size_t(row) * a.kv_heads + kv_head];
        if (length > begin) return Walk<T>(a, row, kv_head, begin, length, MOST_TILES).next();
    }
    return {};
}

// All threads of a parallel region must call it; `room` has the size that decode_room returns.
template <class T>
inline void decode(const Decode<T>& a, Cut cut, float* room, float* kept_logits) {
    const int group = a.group(), spans = cut.spans;
    const int padded_key = int(round_up(a.key_dim, LANES)), padded_value = int(round_up(a.value_dim, LANES));
    const Shape shape{group, a.key_dim, a.value_dim, padded_key, padded_value};
    const size_t each = size_t(group) * (padded_value + 2);
    const int tasks = a.requests * a.kv_heads * spans;
    const int at_once = std::max(1, std::min(8, tasks / (4 * omp_get_num_threads())));
#pragma omp for schedule(dynamic, at_once)
    for (int task = 0; task < tasks; ++task) {
        static thread_local Scratch widened, taken;
        const int span = task % spans, head = task / spans;
        Bundle bundle{head / a.kv_heads, 0, head % a.kv_heads, int64_t(span) * cut.size, {}, {}, {}};
        bundle.rows = rows_together(a, bundle.first, bundle.kv_head, bundle.begin, bundle.begin + cut.size);
        if (!bundle.rows) continue;
        bundle.following = first_after(a, cut, task, tasks);
        const int heads = bundle.rows * group;
        float* queries = widened.get<float>(size_t(heads) * (padded_key + LANES));
        float* sums = queries + size_t(heads) * padded_key;
        T* raw = taken.get<T>(size_t(heads) * a.key_dim);
        for (int i = 0; i < bundle.rows; ++i) {
            const size_t own = size_t(bundle.first + i) * a.kv_heads + bundle.kv_head;
            bundle.ends[i] = std::min(a.lengths[own], bundle.begin + cut.size);
            const T* from = a.queries + size_t((bundle.first + i) * a.heads + bundle.kv_head * group) * a.key_dim;
            std::memcpy(raw + size_t(i) * group * a.key_dim, from, size_t(group) * a.key_dim * sizeof(T));
            float* values = room + (own * spans + span) * each;
            float* top = values + size_t(group) * padded_value;
            bundle.mine[i] = {values, top, sums + size_t(i) * group * LANES};
            std::fill(values, top, 0.f);
            std::fill(top, top + group, NEVER);
            std::fill(bundle.mine[i].sums, bundle.mine[i].sums + group * LANES, 0.f);
        }
        if (a.codec != AS_IS || !takes_pairs<T>(a.key_dim, a.value_dim))
            widen(queries, raw, heads, a.key_dim, padded_key);
        const Lying<T> lying{(const T*)a.keys, (const T*)a.values, a.key_dim, a.value_dim};
        if (a.codec != AS_IS) attend_coded(a, shape, bundle, queries, kept_logits);
        else attend_numbers(a, shape, bundle, lying, raw, queries, kept_logits);
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
        const bool mixed = !takes_integers(a.codec, shape) && takes_pairs<T>(a.key_dim, a.value_dim);
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

// The split, and the number of floats of working memory that it needs.
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
