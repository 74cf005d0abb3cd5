// Plain C++ of softcap and cross entropy. Of a logit z, l = cap·tanh(z/cap), and a row's loss is log Σ exp(l) − l of the
// target.
#pragma once

#include "references_products.h"

constexpr double kCap = 15;
constexpr double kIgnored = -1;

inline double exponential(double z) {
    return std::exp(kCap * std::tanh(z / kCap));
}

// (1 − tanh²)/4
inline double quarter_slope(double z) {
    return (1 - square(std::tanh(z / kCap))) / 4;
}

// Random targets, of which every seventh is ignored.
inline Numbers random_targets(Case& c, const Argument& to, int64_t width) {
    Numbers targets = c.integers(to, 0, width);
    for (size_t i = 3; i < targets.size(); i += 7) {
        targets[i] = kIgnored;
    }
    return c.put(to, targets);
}

// Checks a matrix with a row for each target: the targets' entries apart from the others, which are much smaller.
inline void check_apart(Case& c, const Argument& result, const Numbers& wanted, const Numbers& targets, double epsilon) {
    const int64_t width = wanted.size() / targets.size();
    const Numbers found = c.read_back(result);
    Numbers of_targets[2], of_others[2];
    for (int which = 0; which < 2; ++which) {
        of_others[which] = which == 0 ? found : wanted;
        for (size_t row = 0; row < targets.size(); ++row) {
            if (targets[row] != kIgnored) {
                double& entry = of_others[which][row * width + static_cast<int64_t>(targets[row])];
                of_targets[which].push_back(entry);
                entry = 0;
            }
        }
    }
    c.check(result.name, result.dtype, of_others[0], of_others[1], width, epsilon);
    c.check(result.name + ", targets", result.dtype, of_targets[0], of_targets[1], of_targets[0].size(), 1e-5);
}

// The kernels that read logits: sums of exp(l), losses, and factor·dloss/dz, which one of them writes over the logits.
inline void loss_of_logits(Case& c, double epsilon) {
    const bool on_chip = c.kernel == "cross_entropy_on_chip", has_losses = c.constant("LOSS", 1) != 0;
    const Argument& logits_at = c.argument("logits");
    const Numbers logits = c.random(logits_at, 3);
    const int64_t width = logits_at.width(), rows = logits.size() / width;
    const Numbers targets = random_targets(c, c.argument("targets"), width);
    const Numbers factor = c.constant("FACTOR", 1) != 0 ? c.uniform("factor", 0.5, 2) : Numbers(rows, 1.0);
    c.put("target_logits", numbers(rows, [&](int64_t row) {
              return logits[row * width + std::max<int64_t>(static_cast<int64_t>(targets[row]), 0)];
          }));
    const Numbers sums =
        numbers(rows, [&](int64_t row) { return sum(width, [&](int64_t i) { return exponential(logits[row * width + i]); }); });
    if (c.kernel == "cross_entropy_gradient") {
        c.put("sums", sums);
    }
    c.run();
    c.check("sums", sums, 1e-6);
    const auto target_sum = [&](int64_t row) { return exponential(logits[row * width + static_cast<int64_t>(targets[row])]); };
    if (has_losses) {
        c.check(
            "losses",
            numbers(rows, [&](int64_t row) { return targets[row] == kIgnored ? 0 : std::log(sums[row] / target_sum(row)); }),
            1e-5);
    }
    if (on_chip || !has_losses) {
        check_apart(c, on_chip ? logits_at : c.argument("gradient"),
                    numbers(logits.size(),
                            [&](int64_t i) {
                                const int64_t row = i / width;
                                const double p = exponential(logits[i]) / sums[row] - (targets[row] == i % width ? 1 : 0);
                                return targets[row] == kIgnored ? 0 : factor[row] * p * 4 * quarter_slope(logits[i]);
                            }),
                    targets, epsilon);
    }
}

// The product's epilogue: E = exp(l)·(1 − tanh²)/4, for each row the sum of exp(l) without the target's, and the target's z.
inline void cross_entropy_exponentials(Case& c) {
    const Product product(c, 3);
    const int64_t n = product.n;
    const Numbers targets = random_targets(c, c.argument("arguments.1"), n);
    const Argument &parts = c.argument("arguments.0"), &logits = c.argument("arguments.2");
    const bool has_gradient = c.argument("arguments.4").kind != "none";
    c.run();
    if (has_gradient) {
        c.check("out", product.each([](int64_t, int64_t, double z) { return exponential(z) * quarter_slope(z); }), kProduct);
    }
    const Numbers stored = c.read_back(parts), stored_logits = c.read_back(logits);
    Numbers found, wanted, found_logits, wanted_logits;
    for (int64_t row = 0; row < product.m; ++row) {
        found.push_back(sum(parts.size() / product.m, [&](int64_t part) { return stored[part * product.m + row]; }));
        wanted.push_back(sum(n, [&](int64_t j) { return j == targets[row] ? 0 : exponential(product.sums[row * n + j]); }));
        if (targets[row] != kIgnored) {
            found_logits.push_back(stored_logits[row]);
            wanted_logits.push_back(product.sums[row * n + static_cast<int64_t>(targets[row])]);
        }
    }
    c.check("sums", NK_FLOAT32, found, wanted, product.m, kProduct);
    c.check("target_logits", NK_FLOAT32, found_logits, wanted_logits, found_logits.size(), kProduct);
}

// From the sums of the other exponentials and the targets' logits: losses, a = 4·factor/S, the targets' entries of E, and a
// times these.
inline void cross_entropy_rows(Case& c) {
    const int64_t rows = c.integer("rows"), parts = c.integer("parts"), width = c.integer("width");
    const Numbers sums = c.uniform("sums", 1, 2), z = c.random("target_logits", 3);
    const Numbers targets = random_targets(c, c.argument("targets"), width);
    const bool has_gradient = c.constant("GRADIENT") != 0;
    const Numbers factor = c.constant("FACTOR") != 0 ? c.uniform("factor", 0.5, 2) : Numbers(rows, 1.0);
    Numbers gradient = has_gradient ? c.random("gradient") : Numbers(), losses(rows), scale(rows), coefficient(rows);
    c.run();
    for (int64_t row = 0; row < rows; ++row) {
        const double others = sum(parts, [&](int64_t part) { return sums[part * rows + row]; });
        const bool counts = targets[row] != kIgnored;
        losses[row] = counts ? std::log(1 + others / exponential(z[row])) : 0;
        scale[row] = counts ? 4 * factor[row] / (others + exponential(z[row])) : 0;
        coefficient[row] = -scale[row] * others * quarter_slope(z[row]);
        if (counts && has_gradient) {
            gradient[row * width + static_cast<int64_t>(targets[row])] = -others * quarter_slope(z[row]);
        }
    }
    c.check("losses", losses, 1e-5);
    if (has_gradient) {
        c.check("scale", scale, 1e-5);
        c.check("coefficient", coefficient, 1e-5);
        check_apart(c, c.argument("gradient"), gradient, targets, 0);
    }
}

// Adds coefficient·x of all rows with the same target to the target's row of the gradient.
inline void cross_entropy_target_rows(Case& c) {
    const Argument& x_at = c.argument("x");
    const int64_t width = x_at.width(), rows = x_at.size() / width;
    const Numbers x = c.random(x_at), coefficient = c.random("coefficient"), order = [&] {
        Numbers found = numbers(rows, [&](int64_t i) { return (i * 7) % rows; });
        return c.put("order", found);
    }();
    const Numbers sorted = c.put("sorted", numbers(rows, [&](int64_t i) { return 2 * (i / 3); }));  // three rows each
    c.put("ends", numbers(rows, [&](int64_t i) { return std::min(i / 3 * 3 + 3, rows); }));
    Numbers gradient = c.random("gradient");
    c.run();
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = static_cast<int64_t>(order[i]), target = static_cast<int64_t>(sorted[i]);
        for (int64_t j = 0; j < width && target < c.integer("vocabulary"); ++j) {
            gradient[target * width + j] += coefficient[row] * x[row * width + j];
        }
    }
    c.check("gradient", gradient, 1e-6);
}
