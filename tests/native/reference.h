// Launches of kernels at small shapes, as tests/native/cases.py writes them, with memory for their arguments, and how far
// results may be from plain C++ in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <istream>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "device.h"
#include "nanochat_kernels.h"

using Numbers = std::vector<double>;
using Bytes = std::vector<uint8_t>;

constexpr int64_t kSizes[] = {1, 2, 2, 4, 8, 1, 1, 1, 2, 4, 8};  // bytes of an nk_dtype

// The nearest number of a dtype.
inline double rounded(int dtype, double value) {
    if (dtype == NK_BFLOAT16) {
        return from_bfloat16(to_bfloat16(static_cast<float>(value)));
    }
    if (dtype == NK_FLOAT16 && value != 0 && std::isfinite(value)) {
        const double unit = std::ldexp(1.0, std::max(std::ilogb(value), -14) - 10);
        return std::nearbyint(value / unit) * unit;
    }
    return dtype == NK_FLOAT32 ? static_cast<float>(value) : value;
}

inline double from_float16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                        : exponent == 0 ? std::ldexp(fraction, -24)
                                        : std::ldexp(1024 + fraction, exponent - 25);
    return (bits & 0x8000) != 0 ? -size : size;
}

inline uint16_t to_float16(double value) {
    const double size = std::fabs(rounded(NK_FLOAT16, value));
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (size < std::ldexp(1.0, -14)) {
        return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(size, 24)));
    }
    const int exponent = std::ilogb(size);
    return static_cast<uint16_t>(sign | ((exponent + 15) << 10 | (static_cast<int>(std::ldexp(size, 10 - exponent)) - 1024)));
}

template <class T>
T load_as(const uint8_t* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <class T>
void store_as(uint8_t* at, T value) {
    std::memcpy(at, &value, sizeof value);
}

inline double load(int dtype, const uint8_t* at) {
    switch (dtype) {
        case NK_BFLOAT16:
            return from_bfloat16(load_as<uint16_t>(at));
        case NK_FLOAT16:
            return from_float16(load_as<uint16_t>(at));
        case NK_FLOAT32:
            return load_as<float>(at);
        case NK_FLOAT64:
            return load_as<double>(at);
        case NK_INT32:
            return load_as<int32_t>(at);
        case NK_INT64:
            return static_cast<double>(load_as<int64_t>(at));
        default:
            throw std::runtime_error("the cases have no arguments of nk_dtype " + std::to_string(dtype));
    }
}

inline void store(int dtype, uint8_t* at, double value) {
    switch (dtype) {
        case NK_BFLOAT16:
            return store_as(at, to_bfloat16(static_cast<float>(value)));
        case NK_FLOAT16:
            return store_as(at, to_float16(value));
        case NK_FLOAT32:
            return store_as(at, static_cast<float>(value));
        case NK_FLOAT64:
            return store_as(at, value);
        case NK_INT32:
            return store_as(at, static_cast<int32_t>(value));
        case NK_INT64:
            return store_as(at, static_cast<int64_t>(value));
        default:
            throw std::runtime_error("the cases have no arguments of nk_dtype " + std::to_string(dtype));
    }
}

struct Argument {
    std::string name, kind;  // kind: none, integer, number, pointer, matrix
    int64_t integer = 0;
    double number = 0;
    // of a pointer or matrix: which memory, and what elements it has
    size_t memory = 0;
    int64_t offset = 0;
    int dtype = 0;
    std::vector<int64_t> shape, strides;

    int64_t size() const {
        int64_t count = 1;
        for (const int64_t length : shape) {
            count *= length;
        }
        return count;
    }
    int64_t width() const { return shape.empty() ? 1 : shape.back(); }
    // Where element number `index` lies, counted row by row.
    int64_t place(int64_t index) const {
        int64_t at = offset;
        for (size_t axis = shape.size(); axis-- > 0; index /= shape[axis]) {
            at += index % shape[axis] * strides[axis];
        }
        return at * kSizes[dtype];
    }
};

struct Launch {
    std::string id, function;
    unsigned grid[3];
    std::vector<Argument> arguments;
    const nk_kernel* kernel = nullptr;
};

class Case;
// Makes the launches of a case on its memories. Returns whether the results were computed.
using Run = std::function<bool(Case&)>;

// The launches of one call, their memories, and the check of the results. The names of arguments are those of the kernels
// without _ptr and _desc.
class Case {
public:
    // Reads the next case; returns false at the end of the file.
    bool read(std::istream& file);
    void find_kernels();

    int architecture = 0, number = 0;
    std::string kernel, flags;
    std::vector<Launch> launches;
    std::vector<Bytes> memories;
    Run run_launches;

    bool has(const std::string& name) const { return found(name, 0) != nullptr && found(name, 0)->kind != "none"; }
    // The argument of the first launch from number `from` on that has it.
    const Argument& argument(const std::string& name, size_t from = 0) const;
    int64_t integer(const std::string& name, size_t from = 0) const { return argument(name, from).integer; }
    double number_of(const std::string& name, size_t from = 0) const { return argument(name, from).number; }
    // A constant of a launch's kernel, or 0 if there is none of this name.
    double constant(const char* name, size_t launch = 0) const;

    // Fill an argument, and return its elements as they were rounded.
    Numbers put(const Argument& to, const Numbers& values);
    Numbers put(const std::string& name, const Numbers& values) { return put(argument(name), values); }
    Numbers random(const Argument& to, double scale = 1);
    Numbers random(const std::string& name, double scale = 1) { return random(argument(name), scale); }
    Numbers uniform(const Argument& to, double least, double most);
    Numbers uniform(const std::string& name, double least, double most) { return uniform(argument(name), least, most); }
    // Integers from least to most, most excluded.
    Numbers integers(const Argument& to, int64_t least, int64_t most);
    Numbers read_back(const Argument& from) const;

    // Launches.
    void run() { is_computed = run_launches(*this); }
    bool is_computed = false;
    int checked = 0;  // results that were computed and compared

    // Checks what a launch has stored in an argument, each row of it by itself, or all of it if it has one axis. See
    // kernels.md: the error may be 1.5 times that of the rounded result, and epsilon times the result besides, for what the
    // kernel rounds on its way.
    void check(const Argument& result, const Numbers& wanted, double epsilon);
    void check(const std::string& name, const Numbers& wanted, double epsilon) { check(argument(name), wanted, epsilon); }
    // The same for some of the numbers, in rows of `width`.
    void check(const std::string& what, int dtype, const Numbers& found, const Numbers& wanted, int64_t width, double epsilon);

private:
    const Argument* found(const std::string& name, size_t from) const;
    std::mt19937 generator_{7};
};

inline bool Case::read(std::istream& file) {
    std::string word;
    size_t count = 0;
    if (!(file >> word)) {
        return false;
    }
    file >> architecture >> number >> kernel;
    std::getline(file, flags);
    file >> word >> count;
    memories.resize(count);
    for (Bytes& memory : memories) {
        file >> count;
        memory.assign(std::max<size_t>(count, 16), 0xff);  // NaN
    }
    while (file >> word && word != "end") {
        if (word == "launch") {
            Launch& launch = launches.emplace_back();
            file >> launch.id >> launch.function >> launch.grid[0] >> launch.grid[1] >> launch.grid[2];
            continue;
        }
        Argument& read = launches.back().arguments.emplace_back();
        file >> read.name >> read.kind;
        if (read.kind == "integer") {
            file >> read.integer;
        } else if (read.kind == "number") {
            file >> read.number;
        } else if (read.kind != "none") {
            file >> read.memory >> read.offset >> read.dtype >> count;
            read.shape.resize(count);
            read.strides.resize(count);
            for (auto* numbers : {&read.shape, &read.strides}) {
                for (int64_t& value : *numbers) {
                    file >> value;
                }
            }
        }
    }
    if (word != "end" || !file) {
        throw std::runtime_error("the file of cases ends in the midst of " + kernel + flags);
    }
    return true;
}

inline void Case::find_kernels() {
    for (Launch& launch : launches) {
        CHECK_STATUS(nk_find_id(launch.id.c_str(), architecture, &launch.kernel), NK_OK, "");
        std::vector<nk_parameter> parameters(launch.arguments.size());
        size_t parameter_count = 0;
        CHECK_STATUS(nk_parameters(launch.kernel, 0, parameters.data(), parameters.size(), &parameter_count), NK_OK, "");
        CHECK(parameter_count == launch.arguments.size());
        for (size_t i = 0; i < std::min(parameter_count, parameters.size()); ++i) {
            CHECK(launch.arguments[i].name == parameters[i].name);
        }
    }
}

inline const Argument* Case::found(const std::string& name, size_t from) const {
    for (size_t i = from; i < launches.size(); ++i) {
        for (const Argument& one : launches[i].arguments) {
            if (one.name == name || one.name == name + "_ptr" || one.name == name + "_desc") {
                return &one;
            }
        }
    }
    return nullptr;
}

inline const Argument& Case::argument(const std::string& name, size_t from) const {
    const Argument* one = found(name, from);
    if (one == nullptr) {
        throw std::runtime_error(kernel + flags + " has no argument " + name);
    }
    return *one;
}

inline double Case::constant(const char* name, size_t launch) const {
    double value = 0;
    return nk_constant(launches[launch].kernel, name, &value) == NK_OK ? value : 0;
}

inline Numbers Case::put(const Argument& to, const Numbers& values) {
    if (static_cast<int64_t>(values.size()) != to.size()) {
        throw std::runtime_error(kernel + flags + ": " + to.name + " has " + std::to_string(to.size()) + " elements, not " +
                                 std::to_string(values.size()));
    }
    for (size_t i = 0; i < values.size(); ++i) {
        store(to.dtype, &memories[to.memory].at(to.place(i)), values[i]);
    }
    return read_back(to);
}

inline Numbers Case::random(const Argument& to, double scale) {
    std::normal_distribution<double> normal(0, scale);
    Numbers values(to.size());
    for (double& value : values) {
        value = normal(generator_);
    }
    return put(to, values);
}

inline Numbers Case::uniform(const Argument& to, double least, double most) {
    std::uniform_real_distribution<double> between(least, most);
    Numbers values(to.size());
    for (double& value : values) {
        value = between(generator_);
    }
    return put(to, values);
}

inline Numbers Case::integers(const Argument& to, int64_t least, int64_t most) {
    std::uniform_int_distribution<int64_t> between(least, most - 1);
    Numbers values(to.size());
    for (double& value : values) {
        value = static_cast<double>(between(generator_));
    }
    return put(to, values);
}

inline Numbers Case::read_back(const Argument& from) const {
    Numbers values(from.size());
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = load(from.dtype, &memories[from.memory].at(from.place(i)));
    }
    return values;
}

inline void Case::check(const Argument& result, const Numbers& wanted, double epsilon) {
    const int64_t width = result.shape.size() > 1 ? result.width() : result.size();
    check(result.name, result.dtype, read_back(result), wanted, width, epsilon);
}

inline void Case::check(const std::string& what, int dtype, const Numbers& found, const Numbers& wanted, int64_t width,
                        double epsilon) {
    const std::string where = kernel + flags + ", sm_" + std::to_string(architecture) + ", " + what;
    if (found.size() != wanted.size() || wanted.empty()) {
        ++failed_checks;
        std::fprintf(stderr, "%s: %zu numbers, wanted %zu\n", where.c_str(), found.size(), wanted.size());
        return;
    }
    if (!is_computed) {
        return;
    }
    ++checked;
    double worst = 0;
    size_t at = 0;
    for (size_t start = 0; start < wanted.size(); start += width) {
        double error = 0, rounding = 0, size = 0;
        for (size_t i = start; i < start + width; ++i) {
            error += found[i] == wanted[i] ? 0 : std::pow(found[i] - wanted[i], 2);  // infinities too
            rounding += std::isfinite(wanted[i]) ? std::pow(rounded(dtype, wanted[i]) - wanted[i], 2) : 0;
            size += std::isfinite(wanted[i]) ? wanted[i] * wanted[i] : 0;
        }
        const double share = std::sqrt(error) / (1.5 * std::sqrt(rounding) + epsilon * std::sqrt(size) + 1e-30);
        if (!(share <= worst)) {  // NaN too
            worst = share;
            at = start;
        }
    }
    std::printf("%-90s %.2f of what is allowed\n", where.c_str(), worst);
    if (!(worst <= 1)) {
        ++failed_checks;
        std::fprintf(stderr, "%s: the row from element %zu on is %.9g, ..., wanted %.9g, ...\n", where.c_str(), at, found[at],
                     wanted[at]);
    }
}
