// Plain C++ of the optimizer's kernels and of the key/value cache.
#pragma once

#include "references_norms.h"

inline void matrix_squares(Case& c) {
    const Numbers x = c.random("x");
    const int64_t size = c.integer("size"), batch = x.size() / size;
    c.run();
    const Numbers parts = c.read_back(c.argument("squares"));
    const int64_t count = parts.size() / batch;
    c.check("squares", NK_FLOAT64,
            numbers(batch, [&](int64_t i) { return sum(count, [&](int64_t j) { return parts[i * count + j]; }); }),
            numbers(batch, [&](int64_t i) { return sum(size, [&](int64_t j) { return square(x[i * size + j]); }); }), 1, 1e-12);
}

// x/(‖x‖ + 1e-7), with the norm from partial sums of squares.
inline void matrix_scale(Case& c) {
    const Numbers x = c.random("x"), squares = c.uniform("squares", 1, 2);
    const int64_t size = c.integer("size"), parts = squares.size() * size / x.size();
    c.run();
    c.check("out",
            numbers(x.size(),
                    [&](int64_t i) {
                        return x[i] / (std::sqrt(sum(parts, [&](int64_t j) { return squares[i / size * parts + j]; })) + 1e-7);
                    }),
            1e-6);
}

// Momentum: m += (1 − μ)(g − m), direction = g + μ(m − g), and the squares of the direction.
inline void nesterov_momentum(Case& c) {
    const Numbers gradient = c.random("gradient"), momentum = c.random("momentum");
    const double clip = c.uniform("clip", 0.5, 1)[0], mu = c.uniform("mu", 0.5, 1)[0];
    const int64_t size = c.integer("size"), batch = gradient.size() / size;
    c.run();
    Numbers m(gradient.size()), direction(gradient.size()), squares(batch), found(batch);
    for (size_t i = 0; i < gradient.size(); ++i) {
        const double g = gradient[i] * clip;
        m[i] = momentum[i] + (1 - mu) * (g - momentum[i]);
        direction[i] = g + mu * (m[i] - g);
        squares[i / size] += square(direction[i]);
    }
    const Numbers parts = c.read_back(c.argument("squares"));
    for (size_t i = 0; i < parts.size(); ++i) {
        found[i * batch / parts.size()] += parts[i];
    }
    c.check("momentum", m, 1e-6);
    c.check("direction", direction, 1e-6);
    c.check("squares", NK_FLOAT64, found, squares, 1, 1e-3);  // of the direction as it was rounded
}

inline void apply_update(Case& c) {
    const Numbers weight = c.random("weight"), update = c.random("update");
    const double rate = c.uniform("rate", 0.5, 2)[0], factor = c.number_of("factor");
    c.run();
    const Numbers wanted = numbers(weight.size(), [&](int64_t i) { return weight[i] - update[i] * factor * rate; });
    c.check("weight", wanted, 1e-6);
    if (c.constant("COPY") != 0) {
        c.check("copy", wanted, 1e-6);
    }
}

inline void adamw(Case& c) {
    const Numbers weight = c.random("weight"), gradient = c.random("gradient"), mean = c.random("mean"),
                  variance = c.uniform("variance", 0.1, 1), biases = c.uniform("biases", 0.5, 1);
    const double clip = c.uniform("clip", 0.5, 1)[0], rate = c.uniform("rate", 0.5, 2)[0], factor = c.number_of("factor");
    c.run();
    Numbers new_mean, new_variance, wanted;
    for (size_t i = 0; i < weight.size(); ++i) {
        const double g = gradient[i] * clip;
        new_mean.push_back(mean[i] + c.number_of("new1") * (g - mean[i]));
        new_variance.push_back(variance[i] + c.number_of("new2") * (square(g) - variance[i]));
        const double step = new_mean[i] / biases[0] / (std::sqrt(new_variance[i] / biases[1]) + c.number_of("eps"));
        wanted.push_back(weight[i] - step * factor * rate);
    }
    c.check("mean", new_mean, 1e-6);
    c.check("variance", new_variance, 1e-6);
    c.check("weight", wanted, 1e-6);
    if (c.constant("COPY") != 0) {
        c.check("copy", wanted, 1e-6);
    }
}

// Stores k and v (B, T, G, D) in keys and values (B, S, G, D) from position lengths[b] on.
inline void cache_append(Case& c) {
    Numbers caches[] = {c.random("keys"), c.random("values")};
    const Numbers news[] = {c.random("k"), c.random("v")};
    const int64_t tokens = c.integer("tokens"), positions = c.integer("positions");
    const Numbers lengths = c.integers(c.argument("lengths"), 0, positions - tokens + 1);
    const int64_t width = news[0].size() / (lengths.size() * tokens);  // of all heads of a token
    c.run();
    for (int which = 0; which < 2; ++which) {
        for (size_t i = 0; i < news[which].size(); ++i) {
            const int64_t row = i / (tokens * width), t = i / width % tokens;
            caches[which][((row * positions) + static_cast<int64_t>(lengths[row]) + t) * width + i % width] = news[which][i];
        }
        c.check(which == 0 ? "keys" : "values", caches[which], 0);
    }
}
