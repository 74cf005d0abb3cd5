// Plain C++ of the matrix products with their epilogues.
#pragma once

#include "references_norms.h"

// x·y of a batch, or given sums of slices of it, and the number of the launch with the epilogue.
struct Product {
    int64_t batch, m, n;
    size_t at;
    Numbers sums;

    // scale: of a random result's elements.
    explicit Product(Case& c, double scale = 1) {
        const bool is_split =
            c.launches[0].function == "product_kernel" && c.launches.size() > 1 && c.launches[1].function == "epilogue_kernel";
        at = is_split ? 1 : 0;
        m = c.integer("m");
        n = c.integer("n");
        if (c.launches[0].function == "epilogue_kernel") {  // torch computed the product
            batch = 1;
            sums = c.random("sums", scale);
            CHECK(static_cast<int64_t>(sums.size()) == m * n);
            return;
        }
        const int64_t k = c.integer("k");
        const bool x_transposed = c.constant("X_TRANSPOSED") != 0, y_transposed = c.constant("Y_TRANSPOSED") != 0;
        const Numbers x = c.random("x"), y = c.random("y", scale / std::sqrt(static_cast<double>(k)));
        batch = x.size() / (m * k);
        sums.resize(batch * m * n);
        for (int64_t row = 0; row < batch * m; ++row) {
            const int64_t matrix = row / m, i = row % m;
            for (int64_t s = 0; s < k; ++s) {
                const double factor = x[matrix * m * k + (x_transposed ? s * m + i : i * k + s)];
                for (int64_t j = 0; j < n; ++j) {
                    sums[row * n + j] += factor * y[matrix * k * n + (y_transposed ? j * k + s : s * n + j)];
                }
            }
        }
    }
    // f(row, column, sum) for all elements.
    template <class F>
    Numbers each(F f) const {
        return numbers(sums.size(), [&](int64_t i) { return f(i / n, i % n, sums[i]); });
    }
};

constexpr double kProduct = 1e-5;  // the relative error of sums in float32

inline void scaled_rows(Case& c) {
    const Product product(c);
    const Numbers factor = c.has("arguments.0") ? c.uniform("arguments.0", 0.5, 2) : Numbers(product.m, 1.0);
    c.run();
    c.check("out", product.each([&](int64_t row, int64_t, double x) { return factor[row] * x; }), kProduct);
}

inline void softcapped_logits(Case& c) {
    const Product product(c, 10);
    const double cap = c.number_of("arguments.0");
    c.run();
    c.check("out", product.each([&](int64_t, int64_t, double x) { return cap * std::tanh(x / cap); }), kProduct);
}

inline void relu2_mlp_up(Case& c) {
    const Product product(c);
    const Numbers rstd = c.uniform("arguments.0", 0.5, 2);
    c.run();
    c.check("out", product.each([&](int64_t row, int64_t, double x) { return square(std::max(rstd[row] * x, 0.0)); }),
            kProduct);
}

// rstd·dz with dz = 2·√h·dh, and rstd²·⟨dz, z⟩/C with dz·z = 2·h·dh.
inline void relu2_mlp_hidden_gradient(Case& c) {
    const Product product(c);
    const Argument& first = c.argument("first");
    Numbers h = c.random(first);
    h = c.put(first, numbers(h.size(), [&](int64_t i) { return square(std::max(h[i], 0.0)); }));
    const Numbers rstd = c.uniform("arguments.0", 0.5, 2);
    c.run();
    c.check("out", product.each([&](int64_t row, int64_t column, double x) {
        return 2 * std::sqrt(h[row * product.n + column]) * x * rstd[row];
    }),
            kProduct);
    c.check(c.argument("out", 1),
            numbers(product.m,
                    [&](int64_t row) {
                        const double dot = sum(product.n, [&](int64_t j) {
                            return 2 * h[row * product.n + j] * product.sums[row * product.n + j];
                        });
                        return square(rstd[row]) * dot / c.constant("WIDTH", 1);
                    }),
            kProduct);
}

// sums − c·x + dy: the gradient through a folded norm.
inline void norm_backward(Case& c) {
    const Product product(c);
    const Numbers x = c.random("first"), coefficient = c.random("arguments.0");
    const Numbers dy = c.has("arguments.1") ? c.random("second") : Numbers(x.size());
    c.run();
    c.check("out", product.each([&](int64_t row, int64_t column, double value) {
        const int64_t i = row * product.n + column;
        return value - coefficient[row] * x[i] + dy[i];
    }),
            kProduct);
}

// sums + residual, and rstd of the rows, which the epilogue computes where a part is a whole row.
inline void residual(Case& c) {
    const Product product(c);
    const size_t at = product.at;
    const Numbers added =
        c.argument("arguments.1", at).kind != "none" ? c.random(c.argument("first", at)) : Numbers(product.sums.size());
    c.run();
    const Argument& out = c.argument("out", at);
    Numbers y = product.each([&](int64_t row, int64_t column, double x) { return x + added[row * product.n + column]; });
    c.check(out, y, kProduct);
    for (double& value : y) {
        value = rounded(out.dtype, value);
    }
    const bool whole_rows = c.argument("arguments.2", at).kind == "integer";
    const Argument& rstd = whole_rows ? c.argument("arguments.0", at) : c.argument("out", at + 1);
    c.check(rstd, rstd_of(y, product.n), 1e-4);  // some elements of y round to the other side
}

// Heads of queries and keys rotated and normed, those of values as they are, all times rstd of the row.
inline void qkv_projection(Case& c) {
    const Product product(c);
    const size_t at = product.at;
    const auto given = [&](int number) -> const Argument& { return c.argument("arguments." + std::to_string(number), at); };
    const Numbers rstd = c.uniform(given(0), 0.5, 2);
    const bool together = given(2).kind == "none";  // cos and sin are one matrix, of the positions from 0 on
    const Tables tables = together ? Tables(c, c.argument("first", at)) : Tables(c, given(2), given(3));
    const bool has_offsets = given(5).kind != "none";
    const int64_t tokens = given(7).integer, normed = given(9).integer, width = 2 * tables.half;
    // the tables of the small shapes of the launch tables end with the last token
    const auto offsets_in_table = [&] { return std::min<int64_t>(10, given(2).shape[0] - tokens - given(6).integer + 1); };
    const Numbers offsets = has_offsets ? c.integers(given(4), 0, offsets_in_table()) : Numbers(product.m);
    c.run();
    Numbers out = product.sums, head_rstd(normed / width * product.m);
    for (int64_t row = 0; row < product.m; ++row) {
        const int64_t position =
            row % tokens + (together ? 0 : given(6).integer) + (has_offsets ? static_cast<int64_t>(offsets[row / tokens]) : 0);
        for (int64_t column = 0; column < product.n; column += width) {
            double* const head = &out[row * product.n + column];
            double factor = rstd[row];
            if (column < normed) {
                tables.rotate(head, position);
                const double squares = sum(width, [&](int64_t i) { return square(head[i] * factor); });
                const double found = 1 / std::sqrt(squares / width + kEps);
                head_rstd[column / width * product.m + row] = found;
                factor *= found;
            }
            for (int64_t i = 0; i < width; ++i) {
                head[i] *= factor;
            }
        }
    }
    c.check(c.argument("out", at), out, kProduct);
    c.check(given(1), head_rstd, kProduct);
}

// alpha·x·y + beta·plus + gamma·I; of a symmetric result the lower triangle and its mirror image.
inline void scaled_product(Case& c, bool is_symmetric) {
    const Product product(c);
    const double alpha = c.number_of("arguments.0"), gamma = c.number_of("arguments.2");
    const bool adds = c.has("arguments.1");
    const double beta = adds ? c.number_of("arguments.1") : 0;
    const Numbers plus = adds ? c.random("first") : Numbers(product.sums.size());
    c.run();
    const auto value = [&](int64_t row, int64_t column) {
        const int64_t i = row * product.n + column;
        return alpha * product.sums[i] + beta * plus[i] + (row % product.m == column ? gamma : 0);
    };
    c.check("out", product.each([&](int64_t row, int64_t column, double) {
        const int64_t i = row % product.m;
        return is_symmetric && column > i ? value(row - i + column, i) : value(row, column);
    }),
            kProduct);
}
