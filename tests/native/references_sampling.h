// Plain C++ of sample_tokens: the largest logits of groups of tokens, and the choice of a token by its logit and Gumbel noise.
#pragma once

#include <algorithm>

#include "references_norms.h"

constexpr int64_t kGroup = 32;  // tokens

// lowbias32, Wellons 2018
inline uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352dU;
    x = (x ^ (x >> 15)) * 0x846ca68bU;
    return x ^ (x >> 16);
}

// Integers in the order of float32 numbers, followed by the token, the smaller one first.
inline int64_t packed(float score, int64_t token) {
    int32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    bits ^= (bits >> 31) & 0x7fffffff;
    return static_cast<int64_t>(bits) * (int64_t{1} << 32) + (0x7fffffff - token);
}

inline int64_t token_of(int64_t key) {
    return 0x7fffffff - (key & 0xffffffff);
}

struct Sampling {
    int64_t rows, vocabulary, groups;
    Numbers logits, keys, steps, temperature;

    explicit Sampling(Case& c)
        : vocabulary(c.integer("vocabulary")), groups(c.integer("groups")), logits(c.random("logits", 3)) {
        rows = logits.size() / vocabulary;
        keys = c.integers(c.argument("keys"), 0, int64_t{1} << 32);
        steps = c.integers(c.argument("steps"), 0, 1000);
        temperature = c.uniform("temperature", 0.5, 1);
    }
    double logit(int64_t row, int64_t token) const { return logits[row * vocabulary + token]; }
    // The score of a token, but for the row's largest logit.
    double score(int64_t row, int64_t token) const {
        const uint32_t first = static_cast<uint32_t>(keys[2 * row]), second = static_cast<uint32_t>(keys[2 * row + 1]);
        const uint32_t random = mixed(mixed(mixed(first) ^ second) ^ static_cast<uint32_t>(steps[row]));
        const double u = ((mixed(mixed(static_cast<uint32_t>(token)) ^ random) >> 9) + 0.5) / (1 << 23);
        return logit(row, token) / temperature[row] - std::log(-std::log(u));
    }
    // The token from `from` to the end of its group, or of the vocabulary, of which f is largest.
    template <class F>
    int64_t best(int64_t from, int64_t count, F f) const {
        int64_t found = from;
        for (int64_t token = from; token < std::min(from + count, vocabulary); ++token) {
            found = f(token) > f(found) ? token : found;
        }
        return found;
    }
    double largest(int64_t row, int64_t group) const {
        return logit(row, best(group * kGroup, kGroup, [&](int64_t token) { return logit(row, token); }));
    }
    // Σ exp(logit − largest) of a group, in units of 2^−25.
    double exponentials(int64_t row, int64_t group) const {
        const int64_t first = group * kGroup, count = std::min(kGroup, vocabulary - first);
        const double base = largest(row, group);
        return sum(count, [&](int64_t i) { return std::floor(std::exp(logit(row, first + i) - base) * (1 << 25) + 0.5); });
    }
    int64_t best_of_group(int64_t row, int64_t group) const {
        return best(group * kGroup, kGroup, [&](int64_t token) { return score(row, token); });
    }
};

inline void sample_tokens_groups(Case& c) {
    const Sampling s(c);
    const int64_t all = s.rows * s.groups;
    c.run();
    c.check("maxima", numbers(all, [&](int64_t i) { return s.largest(i / s.groups, i % s.groups); }), 0);
    c.check("sums", numbers(all, [&](int64_t i) { return s.exponentials(i / s.groups, i % s.groups); }), 1e-6);
    if (c.constant("ANY_ALL") != 0 && c.is_computed) {
        const Argument& best = c.argument("best");  // keys do not fit in a double
        c.check("best", NK_INT64,
                numbers(all, [&](int64_t i) { return token_of(load_as<int64_t>(&c.memories[best.memory].at(best.place(i)))); }),
                numbers(all, [&](int64_t i) { return s.best_of_group(i / s.groups, i % s.groups); }), s.groups, 0);
    }
}

inline void sample_tokens_choice(Case& c) {
    const Sampling s(c);
    const int64_t all = s.rows * s.groups, candidates = c.integer("candidates"), alternatives = c.integer("alternatives");
    const bool any_all = c.constant("ANY_ALL") != 0;
    const Numbers top_k =
        c.integers(c.argument("top_k"), any_all ? 0 : 1, any_all ? std::min<int64_t>(3, candidates + 1) : candidates + 1);
    c.put("maxima", numbers(all, [&](int64_t i) { return s.largest(i / s.groups, i % s.groups); }));
    c.put("sums", numbers(all, [&](int64_t i) { return s.exponentials(i / s.groups, i % s.groups); }));
    for (int64_t i = 0; any_all && i < all; ++i) {  // of scores in which the group's largest logit stands for the row's
        const int64_t row = i / s.groups, token = s.best_of_group(row, i % s.groups);
        const double score = s.score(row, token) - s.largest(row, i % s.groups) / s.temperature[row];
        const Argument& best = c.argument("best");
        store_as(&c.memories[best.memory].at(best.place(i)), packed(static_cast<float>(score), token));
    }
    c.run();
    Numbers tokens, logprobs;
    for (int64_t row = 0; row < s.rows; ++row) {
        std::vector<int64_t> ranked(s.vocabulary);
        for (int64_t token = 0; token < s.vocabulary; ++token) {
            ranked[token] = token;
        }
        std::stable_sort(ranked.begin(), ranked.end(), [&](int64_t x, int64_t y) { return s.logit(row, x) > s.logit(row, y); });
        const double lse = std::log(sum(s.vocabulary, [&](int64_t token) { return std::exp(s.logit(row, token)); }));
        const int64_t count = top_k[row] == 0 ? s.vocabulary : static_cast<int64_t>(top_k[row]);
        const auto chosen = std::max_element(ranked.begin(), ranked.begin() + count,
                                             [&](int64_t x, int64_t y) { return s.score(row, x) < s.score(row, y); });
        const int64_t first = *chosen;
        for (int64_t i = -1; i < alternatives; ++i) {
            const int64_t token = i < 0 ? first : ranked[i];
            tokens.push_back(static_cast<double>(token));
            logprobs.push_back(s.logit(row, token) - lse);
        }
    }
    c.check("tokens", tokens, 0);
    c.check("logprobs", logprobs, 1e-5);
}
