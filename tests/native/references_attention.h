// Plain C++ of causal attention, scale D^−½, and its gradients.
#pragma once

#include "references_norms.h"

// The heads of an attention, which tokens see which, and the logarithm of the sum of exp(score) of each query. Numbers are (B,
// T, H, D).
struct Attention {
    Case& c;
    int64_t batch, tokens, keys, heads, width, page = 0;
    Numbers q, k, v, lengths, starts, ends, pages, lse;  // lse: (B, H, T)

    explicit Attention(Case& given)
        : c(given), tokens(c.integer("tokens")), heads(c.integer(c.has("heads") ? "heads" : "groups")) {
        const Argument& at = c.argument("q");
        width = at.shape.size() == 4 ? at.width() : at.width() / heads;
        batch = at.size() / (tokens * heads * width);
        keys = c.has("all_keys") ? c.integer("all_keys") : tokens;
        q = normed("q");
        k = normed("k");
        v = c.random("v");
        if (c.has("counter")) {
            c.put("counter", {0});
        }
        if (c.constant("LENGTHS") != 0) {
            lengths = c.put("lengths", numbers(batch, [&](int64_t row) { return row == 0 ? keys : 60; }));
        }
        // documents of 50 tokens, and of 70 in other rows
        const auto document = [&](int64_t i) { return i % tokens / (50 + 20 * (i / tokens)) * (50 + 20 * (i / tokens)); };
        if (c.constant("STARTS") != 0) {
            starts = c.put("starts", numbers(batch * tokens, document));
        }
        if (c.constant("ENDS") != 0) {
            ends = c.put("ends", numbers(batch * tokens,
                                         [&](int64_t i) { return std::min(document(i) + 50 + 20 * (i / tokens), tokens); }));
        }
        page = static_cast<int64_t>(c.constant("PAGE"));
        if (page != 0) {
            const int64_t count = c.argument("pages").size();
            pages = c.put("pages", numbers(count, [&](int64_t i) { return count - 1 - i; }));
        }
        lse.resize(batch * heads * tokens);
        for (int64_t i = 0; i < batch * heads * tokens; ++i) {
            const int64_t row = i / tokens / heads, head = i / tokens % heads, t = i % tokens;
            lse[i] = std::log(sum(keys, [&](int64_t s) { return sees(row, t, s) ? std::exp(score(row, head, t, s)) : 0; }));
        }
    }
    // Random heads with a mean square of 1, which bounds the scores.
    Numbers normed(const char* name) {
        Numbers x = c.random(name);
        const Numbers rstd = rstd_of(x, width);
        return c.put(name, numbers(x.size(), [&](int64_t i) { return x[i] * rstd[i / width]; }));
    }
    const double* query(const Numbers& x, int64_t row, int64_t head, int64_t t) const {
        return &x[((row * tokens + t) * heads + head) * width];
    }
    const double* key(const Numbers& x, int64_t row, int64_t head, int64_t s) const {
        const int64_t token =
            page == 0 ? row * keys + s : static_cast<int64_t>(pages[row * (keys / page) + s / page]) * page + s % page;
        return &x[(token * heads + head) * width];
    }
    bool sees(int64_t row, int64_t t, int64_t s) const {
        const int64_t length = lengths.empty() ? keys : static_cast<int64_t>(lengths[row]);
        const int64_t i = row * tokens;
        return s <= t + length - tokens && (starts.empty() || s >= starts[i + t]) && (ends.empty() || t < ends[i + s]);
    }
    double score(int64_t row, int64_t head, int64_t t, int64_t s) const {
        return dot(query(q, row, head, t), key(k, row, head, s)) / std::sqrt(static_cast<double>(width));
    }
    double dot(const double* x, const double* y) const {
        return sum(width, [&](int64_t i) { return x[i] * y[i]; });
    }
    // Calls f(row, head, t, s, probability) for all that see each other.
    template <class F>
    void each(F f) const {
        for (int64_t i = 0; i < batch * heads * tokens; ++i) {
            const int64_t row = i / tokens / heads, head = i / tokens % heads, t = i % tokens;
            for (int64_t s = 0; s < keys; ++s) {
                if (sees(row, t, s)) {
                    f(row, head, t, s, std::exp(score(row, head, t, s) - lse[i]));
                }
            }
        }
    }
};

// to += factor·from, for the channels of a head
inline void add(double* to, double factor, const double* from, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        to[i] += factor * from[i];
    }
}

// p, and ds in backward, are rounded to bfloat16 before they are multiplied.
constexpr double kAttention = 1.0 / 256;

inline void attention_forward(Case& c) {
    const Attention a(c);
    c.run();
    Numbers out(a.q.size());
    a.each([&](int64_t row, int64_t head, int64_t t, int64_t s, double p) {
        add(&out[a.query(a.q, row, head, t) - a.q.data()], p, a.key(a.v, row, head, s), a.width);
    });
    // of all channels of a row's head, because a sum of few keys rounds as they do
    const Argument& at = c.argument("out");
    c.check("out", at.dtype, c.read_back(at), out, a.width, kAttention);
    if (c.argument("lse").size() != 0) {
        c.check("lse", a.lse, 1e-4);
    }
}

// What qkv_projection makes of its heads: rstd of rows and heads, and the rotation. It is undone in the kernel that makes the
// gradient.
struct Projection {
    Case& c;
    bool is_given;
    Numbers rstd, head_rstd;
    std::vector<Tables> tables;

    explicit Projection(Case& given) : c(given), is_given(c.constant("PROJECTED") != 0) {
        if (is_given) {
            rstd = c.uniform(part(0, "rstd"), 0.5, 2);
            head_rstd = c.uniform(part(1, "head_rstd"), 0.5, 2);
            tables.emplace_back(c, part(2, "cos"), part(3, "sin"));
        }
    }
    const Argument& part(int number, const char* name) const {
        const std::string in_tuple = "factors." + std::to_string(number);
        return c.argument(c.has(in_tuple) ? in_tuple : name);
    }
    // Checks the gradient of x (B, S, H, D), whose heads are those from number `first` on of a row of the result.
    void check(const char* name, Numbers gradient, const Numbers& x, const Attention& a, int64_t tokens, int64_t first,
               bool is_normed) const {
        const Argument& to = c.argument(name);
        const Numbers all = c.read_back(to);
        const int64_t rows = a.batch * tokens, row_heads = all.size() / (rows * a.width);
        Numbers found, sums, found_sums;
        for (int64_t i = 0; i < rows * a.heads; ++i) {
            const int64_t row = i / a.heads, head = (is_given ? first : 0) + i % a.heads;
            const double* const from = &all[(row * row_heads + head) * a.width];
            found.insert(found.end(), from, from + a.width);
            if (!is_given) {
                continue;
            }
            double* const g = &gradient[i * a.width];
            const double* const y = &x[i * a.width];
            const double factor = is_normed ? head_rstd[head * rows + row] : 1;
            sums.push_back(a.dot(g, y) * (is_normed ? kEps * square(factor) : 1));
            found_sums.push_back(c.read_back(part(4, "sums"))[head * rows + row]);
            if (is_normed) {
                undo_norm_and_rotation(g, y, factor, tables[0], row % tokens + c.integer("offset"));
            }
            for (int64_t j = 0; j < a.width; ++j) {
                g[j] *= rstd[row];
            }
        }
        c.check(name, to.dtype, found, gradient, a.width, 2 * kAttention);
        if (is_given) {
            c.check(std::string(name) + ", sums", NK_FLOAT32, found_sums, sums, sums.size(), 0.03);
        }
    }
};

// dq = ds·k/√D with ds = p·(dout·v − delta), delta = ⟨dout, out⟩ − dlse.
inline void attention_query_gradient(Case& c) {
    const Attention a(c);
    const Projection projection(c);
    const Numbers dout = c.random("dout"), out = c.random("out");
    c.put("lse", a.lse);
    const Numbers dlse = c.constant("DLSE") != 0 ? c.random("dlse") : Numbers(a.lse.size());
    c.run();
    const Numbers delta = numbers(a.lse.size(), [&](int64_t i) {
        const int64_t row = i / a.tokens / a.heads, head = i / a.tokens % a.heads, t = i % a.tokens;
        return a.dot(a.query(dout, row, head, t), a.query(out, row, head, t)) - dlse[i];
    });
    Numbers dq(a.q.size());
    a.each([&](int64_t row, int64_t head, int64_t t, int64_t s, double p) {
        const double dp = a.dot(a.query(dout, row, head, t), a.key(a.v, row, head, s));
        const double ds = p * (dp - delta[(row * a.heads + head) * a.tokens + t]) / std::sqrt(static_cast<double>(a.width));
        add(&dq[a.query(a.q, row, head, t) - a.q.data()], ds, a.key(a.k, row, head, s), a.width);
    });
    c.check("delta", delta, 1e-5);
    projection.check("dq", dq, a.q, a, a.tokens, 0, true);
}

// dk = dsᵀ·q/√D and dv = pᵀ·dout.
inline void attention_key_gradients(Case& c) {
    const Attention a(c);
    const Projection projection(c);
    const Numbers dout = c.random("dout"), delta = c.random("delta");
    c.put("lse", a.lse);
    c.run();
    Numbers dk(a.k.size()), dv(a.v.size());
    a.each([&](int64_t row, int64_t head, int64_t t, int64_t s, double p) {
        const double* const upstream = a.query(dout, row, head, t);
        const double dp = a.dot(upstream, a.key(a.v, row, head, s));
        const double ds = p * (dp - delta[(row * a.heads + head) * a.tokens + t]) / std::sqrt(static_cast<double>(a.width));
        const int64_t at = a.key(a.k, row, head, s) - a.k.data();
        add(&dk[at], ds, a.query(a.q, row, head, t), a.width);
        add(&dv[at], p, upstream, a.width);
    });
    projection.check("dk", dk, a.k, a, a.keys, a.heads, true);
    projection.check("dv", dv, a.v, a, a.keys, 2 * a.heads, false);
}
