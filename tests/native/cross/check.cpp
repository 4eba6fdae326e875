// The kernels without Python: linears of every format, norms, rotation, and decode attention of one
// request (no codes of its cache, no pages that are shared) against sums in double.  Built by `make test-cross` for a CPU that is emulated; exits with the number of
// faults.
#include <cstdio>
#include <random>
#include <vector>

#include "kernels.cpp"

static int faults = 0;

static void check(const char* what, int a, int b, double got, double expected, double near) {
    if (std::fabs(got - expected) <= near) return;
    if (++faults < 20) std::printf("%s %d %d: %g instead of %g\n", what, a, b, got, expected);
}

static std::vector<float> numbers(size_t count, unsigned seed) {
    std::mt19937 draw(seed);
    std::normal_distribution<float> normal;
    std::vector<float> out(count);
    for (float& each : out) each = normal(draw);
    return out;
}

template <class T>
static std::vector<T> as(const std::vector<float>& from) {
    std::vector<T> out(from.size() + 64);
    for (size_t i = 0; i < from.size(); ++i) from_float(from[i], out[i]);
    return out;
}

// dtype: 0 float32, 1 bfloat16; `near`: of the sum of the products' sizes.
template <class T>
static void linears(int dtype, int format, int64_t rows, int64_t depth, int64_t columns, double near) {
    const auto a = as<T>(numbers(rows * depth, 1)), weights = as<T>(numbers(columns * depth, 2));
    const int64_t panels = ceil_div(columns, COLUMNS);
    std::vector<uint32_t> packed(size_t(panels * COLUMNS * (depth + GROUP)) * 2);
    if (format == NUMBERS) pack_linear(dtype, weights.data(), columns, depth, packed.data());
    else {
        std::vector<const void*> at;
        const std::vector<int32_t> sources(columns, dtype ? BFLOAT16 : FLOAT32);
        for (int64_t c = 0; c < columns; ++c) at.push_back(weights.data() + c * depth);
        pack_coded(format, at.data(), sources.data(), columns, depth, packed.data());
    }
    const Linear w{packed.data(), nullptr, columns, depth, format};
    std::vector<int64_t> all(columns);
    for (int64_t c = 0; c < columns; ++c) all[c] = c;
    std::vector<T> held(columns * depth + 64), out(rows * columns + 64);
    read_rows(dtype, &w, all.data(), columns, held.data());
    for (int64_t i = 0; i < columns * depth; ++i)  // codes of 4 bits are up to half a step away
        check("weight", format, dtype, to_float(held[i]), to_float(weights[i]), 0.3);
    run_linear(dtype, a.data(), rows, &w, PLAIN, nullptr, out.data(), nullptr, 0);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
            double sum = 0, size = 0;
            for (int64_t d = 0; d < depth; ++d) {
                const double product = double(to_float(a[r * depth + d])) * to_float(held[c * depth + d]);
                sum += product, size += std::fabs(product);
            }
            check("linear", format, dtype, to_float(out[r * columns + c]), sum, near * size);
        }
}

template <class T>
static void norm_and_turn(int dtype, double near) {
    const int64_t rows = 3, size = 40;
    const auto x = as<T>(numbers(rows * size, 3)), weight = as<T>(numbers(size, 4));
    std::vector<T> out(rows * size + 64);
    run_norm(dtype, x.data(), rows, size, weight.data(), 0, 1e-5f, out.data());
    for (int64_t r = 0; r < rows; ++r) {
        double squares = 0;
        for (int64_t d = 0; d < size; ++d) squares += std::pow(to_float(x[r * size + d]), 2);
        for (int64_t d = 0; d < size; ++d) {
            const double scaled = to_float(x[r * size + d]) / std::sqrt(squares / size + 1e-5);
            check("norm", int(r), int(d), to_float(out[r * size + d]), scaled * to_float(weight[d]), near);
        }
    }
    auto qkv = as<T>(numbers(rows * 3 * size, 5));
    const auto before = qkv;
    const auto cos = numbers(rows * size, 6), sin = numbers(rows * size, 7);
    const Heads heads{1, 1, size, size, nullptr, nullptr, 0.f, 0};
    run_rotate(dtype, qkv.data(), rows, &heads, cos.data(), sin.data());
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < 3 * size; ++d) {
            const int64_t head = d / size, at = d % size, half = size / 2;
            const T* from = before.data() + (r * 3 + head) * size;
            double expected = to_float(from[at]);
            if (head < 2) {
                const double other = at < half ? -to_float(from[at + half]) : to_float(from[at - half]);
                expected = expected * cos[r * size + at] + other * sin[r * size + at];
            }
            check("rotation", int(r), int(d), to_float(qkv[(r * 3 + head) * size + at]), expected, near * 4);
        }
}

template <class T>
static void attention(int dtype, int64_t dim, int64_t length, double near) {
    const int64_t heads = 4, kv_heads = 2, page = 16, pages = ceil_div(length, page);
    const auto queries = as<T>(numbers(heads * dim, 8));
    const auto keys = as<T>(numbers(kv_heads * pages * page * dim, 9));
    const auto values = as<T>(numbers(kv_heads * pages * page * dim, 10));
    std::vector<int32_t> positions(kv_heads * pages * page), table(kv_heads * pages);
    for (size_t i = 0; i < table.size(); ++i) table[i] = int32_t(i);
    for (size_t i = 0; i < positions.size(); ++i) positions[i] = int32_t(i % (pages * page));
    const std::vector<int64_t> lengths(kv_heads, length), at(1, length - 1);
    std::vector<T> out(heads * dim + 64);
    std::vector<float> lse(heads);
    const DecodeCall call{queries.data(), keys.data(), values.data(), positions.data(), nullptr, nullptr,
                          table.data(), lengths.data(), at.data(), out.data(), lse.data(), nullptr,
                          1, heads, kv_heads, dim, dim, page, pages, 0, length, 0, 0.125f, 0.f};
    decode_attention(dtype, &call, 1);
    for (int64_t h = 0; h < heads; ++h) {
        const size_t first = size_t(h / (heads / kv_heads)) * pages * page * dim;
        std::vector<double> weights(length), sums(dim);
        double total = 0;
        for (int64_t e = 0; e < length; ++e) {
            double product = 0;
            for (int64_t d = 0; d < dim; ++d)
                product += double(to_float(queries[h * dim + d])) * to_float(keys[first + e * dim + d]);
            total += weights[e] = std::exp(product * 0.125);
        }
        check("lse", int(h), 0, lse[h], std::log(total), near);
        for (int64_t d = 0; d < dim; ++d) {
            double sum = 0;
            for (int64_t e = 0; e < length; ++e) sum += weights[e] / total * to_float(values[first + e * dim + d]);
            check("attention", int(h), int(d), to_float(out[h * dim + d]), sum, near);
        }
    }
}

int main() {
    const int formats[] = {NUMBERS,
                           CODES,
                           CODES | FOUR | LEAST,
                           CODES | LEAST | FLOATS,
                           CODES | FOUR | LEAST | FLOATS,
                           CODES | HALVES | FLOATS,
                           CODES | LEAST | HALVES | FLOATS};
    for (int format : formats)
        for (int64_t rows : {1, 4, 9}) {
            const double coded = format == NUMBERS ? 0 : 0.01;
            linears<float>(0, format, rows, 96, 70, 1e-5 + coded);
            linears<bf16>(1, format, rows, 64, 70, 4e-3 + coded);
        }
    norm_and_turn<float>(0, 1e-5), norm_and_turn<bf16>(1, 3e-2);
    for (int64_t dim : {40, 64})
        for (int64_t length : {37, 600}) {
            attention<float>(0, dim, length, 1e-4), attention<bf16>(1, dim, length, 2e-2);
            attention<fp16>(2, dim, length, 4e-3);
        }
    std::printf("%s, %d lanes: %d faults\n", isa(), int(lanes()), faults);
    return faults > 0;
}
