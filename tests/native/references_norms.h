// Plain C++ of the kernels of norms and rotation.
#pragma once

#include "reference.h"

// The sum of f(0), ..., f(count − 1).
template <class F>
double sum(int64_t count, F f) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
        total += f(i);
    }
    return total;
}

// Numbers f(0), ..., f(count − 1).
template <class F>
Numbers numbers(int64_t count, F f) {
    Numbers values(count);
    for (int64_t i = 0; i < count; ++i) {
        values[i] = f(i);
    }
    return values;
}

inline double square(double x) {
    return x * x;
}

constexpr double kEps = 1.1920928955078125e-07;  // of the norms

// (mean of x² + eps)^−½ of each row.
inline Numbers rstd_of(const Numbers& x, int64_t width) {
    return numbers(x.size() / width, [&](int64_t row) {
        return 1 / std::sqrt(sum(width, [&](int64_t i) { return square(x[row * width + i]); }) / width + kEps);
    });
}

inline void rms_norm_forward(Case& c) {
    Numbers total = c.random("x");
    const int64_t width = c.argument("x").width();
    const bool adds = c.constant("ADD") != 0;
    if (adds) {
        const Numbers update = c.random("update");
        total = numbers(total.size(), [&](int64_t i) { return total[i] + update[i]; });
    }
    c.run();
    if (adds) {
        c.check("total", total, 0);
        total = numbers(total.size(), [&](int64_t i) { return rounded(c.argument("x").dtype, total[i]); });
    }
    const Numbers rstd = rstd_of(total, width);
    c.check("y", numbers(total.size(), [&](int64_t i) { return total[i] * rstd[i / width]; }), 1e-6);
    if (c.constant("KEEP_RSTD") != 0) {
        c.check("rstd", rstd, 1e-6);
    }
}

// dx = rstd·(dy − y·mean(dy·y)) + dtotal.
inline void rms_norm_backward(Case& c) {
    const Numbers dy = c.random("dy"), y = c.random("y"), rstd = c.uniform("rstd", 0.5, 2);
    const int64_t width = c.argument("y").width();
    const bool adds = c.constant("ADD") != 0;
    const Numbers dtotal = adds ? c.random("dtotal") : Numbers(dy.size());
    c.run();
    Numbers dx;
    for (size_t row = 0; row < rstd.size(); ++row) {
        const int64_t at = row * width;
        const double projection = sum(width, [&](int64_t i) { return dy[at + i] * y[at + i]; }) / width;
        for (int64_t i = at; i < at + width; ++i) {
            dx.push_back(rstd[row] * (dy[i] - y[i] * projection) + dtotal[i]);
        }
    }
    c.check("dx", dx, 1e-6);
}

inline void row_rstd(Case& c) {
    const Numbers x = c.random("x");
    c.run();
    c.check("rstd", rstd_of(x, c.argument("x").width()), 1e-6);
}

// rstd of rows from partial sums of squares, or r²·sum/width.
inline void finish_rows(Case& c) {
    const Numbers sums = c.uniform("sums", 1, 2);
    const int64_t rows = c.integer("rows"), parts = c.integer("parts");
    const double width = c.constant("WIDTH");
    const bool is_backward = c.constant("BACKWARD") != 0;
    const Numbers rstd = is_backward ? c.uniform("rstd", 0.5, 2) : Numbers(rows);
    c.run();
    c.check("out",
            numbers(rows,
                    [&](int64_t row) {
                        const double total = sum(parts, [&](int64_t part) { return sums[part * rows + row]; });
                        return is_backward ? square(rstd[row]) * total / width : 1 / std::sqrt(total / width + kEps);
                    }),
            1e-6);
}

// cos and sin (positions, D/2) of random angles, and the position of each token.
struct Tables {
    Numbers cos, sin;
    int64_t half;

    Tables(Case& c, const Argument& cos_at, const Argument& sin_at) : half(cos_at.width()) {
        const Numbers angles = c.uniform(cos_at, 0, 6.25);
        cos = c.put(cos_at, numbers(angles.size(), [&](int64_t i) { return std::cos(angles[i]); }));
        sin = c.put(sin_at, numbers(angles.size(), [&](int64_t i) { return std::sin(angles[i]); }));
    }
    // cos in the left half and sin in the right half of each row of one matrix.
    Tables(Case& c, const Argument& both) : half(both.width() / 2) {
        const Numbers found = c.random(both);
        for (size_t i = 0; i < found.size(); ++i) {
            (static_cast<int64_t>(i) % (2 * half) < half ? cos : sin).push_back(found[i]);
        }
    }
    // Rotates the halves of a head by −θ, or by θ.
    void rotate(double* head, int64_t position, bool back = false) const {
        for (int64_t i = 0; i < half; ++i) {
            const double x1 = head[i], x2 = head[half + i], co = cos[position * half + i];
            const double si = back ? -sin[position * half + i] : sin[position * half + i];
            head[i] = x1 * co + x2 * si;
            head[half + i] = x2 * co - x1 * si;
        }
    }
};

// The positions of tokens: offset, and with OFFSETS more for each row of the batch.
struct Positions {
    int64_t tokens, offset;
    Numbers offsets;

    Positions(Case& c, const char* name = "offsets") : tokens(c.integer("tokens")), offset(c.integer("offset")) {
        if (c.constant("OFFSETS") != 0) {
            offsets = c.integers(c.argument(name), 0, 10);
        }
    }
    int64_t operator()(int64_t row) const {
        return row % tokens + offset + (offsets.empty() ? 0 : static_cast<int64_t>(offsets[row / tokens]));
    }
};

inline void qk_norm_rope_forward(Case& c) {
    const Numbers given[] = {c.random("q"), c.random("k")};
    const Tables tables(c, c.argument("cos"), c.argument("sin"));
    const Positions position(c);
    const int64_t width = 2 * tables.half;
    c.run();
    for (int which = 0; which < 2; ++which) {
        const std::string name = which == 0 ? "q" : "k";
        Numbers heads = given[which];
        const int64_t count = c.integer(name + "_heads"), all = heads.size() / width, rows = all / count;
        Numbers rstd(all);  // (H, B, T)
        for (int64_t i = 0; i < all; ++i) {
            double* const head = &heads[i * width];
            tables.rotate(head, position(i / count));
            const double factor = 1 / std::sqrt(sum(width, [&](int64_t j) { return square(head[j]); }) / width + kEps);
            rstd[i % count * rows + i / count] = factor;
            for (int64_t j = 0; j < width; ++j) {
                head[j] *= factor;
            }
        }
        c.check(name + "_out", heads, 1e-6);
        if (c.constant("KEEP_RSTD") != 0) {
            c.check(name + "_rstd", rstd, 1e-6);
        }
    }
}

// Turns the gradient of a head y that was rotated and normed into that of what it was made of, without the factor rstd.
inline void undo_norm_and_rotation(double* gradient, const double* y, double head_rstd, const Tables& tables,
                                   int64_t position) {
    const int64_t width = 2 * tables.half;
    const double projection = sum(width, [&](int64_t i) { return gradient[i] * y[i]; }) / width;
    for (int64_t i = 0; i < width; ++i) {
        gradient[i] = head_rstd * (gradient[i] - y[i] * projection);
    }
    tables.rotate(gradient, position, true);
}

inline void qk_norm_rope_backward(Case& c) {
    const Tables tables(c, c.argument("cos"), c.argument("sin"));
    const Positions position(c);
    const int64_t width = 2 * tables.half;
    Numbers normed[2], rstd[2], gradients[2];
    const std::string names[] = {"q", "k"};
    for (int which = 0; which < 2; ++which) {
        if (c.integer(names[which] + "_heads") != 0) {
            normed[which] = c.random(names[which] + "_out");
            rstd[which] = c.uniform(names[which] + "_rstd", 0.5, 2);
            gradients[which] = c.random("d" + names[which] + "_out");
        }
    }
    c.run();
    for (int which = 0; which < 2; ++which) {
        Numbers& gradient = gradients[which];
        const int64_t count = c.integer(names[which] + "_heads"), all = gradient.size() / width;
        for (int64_t i = 0; i < all; ++i) {
            undo_norm_and_rotation(&gradient[i * width], &normed[which][i * width],
                                   rstd[which][i % count * (all / count) + i / count], tables, position(i / count));
        }
        if (count != 0) {
            c.check("d" + names[which], gradient, 1e-6);
        }
    }
}

// rstd·dz of all heads from the gradients of q, k and v, and r²·⟨dz, z⟩/C, where z is what the heads were made of.
inline void qkv_backward(Case& c) {
    const Numbers parts[] = {c.random("dq"), c.random("dk"), c.random("dv")}, rstd = c.uniform("rstd", 0.5, 2),
                  head_rstd = c.uniform("head_rstd", 0.5, 2), qkv = c.random("qkv");
    const Tables tables(c, c.argument("cos"), c.argument("sin"));
    const Positions position(c);
    const int64_t width = 2 * tables.half, heads = c.integer("q_heads"), rows = rstd.size();
    c.run();
    Numbers dz(qkv.size()), coefficient(rows);
    for (int64_t row = 0; row < rows; ++row) {
        double total = 0;
        for (int64_t head = 0; head < 3 * heads; ++head) {
            const int64_t at = (row * 3 * heads + head) * width;
            const double* const from = &parts[head / heads][(row * heads + head % heads) * width];
            double* const to = &dz[at];
            std::copy(from, from + width, to);
            const double dot = sum(width, [&](int64_t i) { return to[i] * qkv[at + i]; });
            if (head < 2 * heads) {
                const double factor = head_rstd[head * rows + row];
                undo_norm_and_rotation(to, &qkv[at], factor, tables, position(row));
                total += dot * kEps * square(factor);
            } else {
                total += dot;
            }
            for (int64_t i = 0; i < width; ++i) {
                to[i] *= rstd[row];
            }
        }
        coefficient[row] = square(rstd[row]) * total / c.constant("WIDTH", 1);
    }
    c.check("dz", dz, 1e-6);
    c.check("out", coefficient, 1e-5);
}
