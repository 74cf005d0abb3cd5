// Numbers for the kernels, and how far their results may be from plain C++ in double.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "device.h"
#include "nanochat_kernels.h"

using Numbers = std::vector<double>;

// Random normal numbers that bfloat16 or float32 represents.
class Random {
public:
    Numbers bfloat16(size_t count, double scale = 1) {
        Numbers values = float32(count, scale);
        for (double& value : values) {
            value = from_bfloat16(to_bfloat16(static_cast<float>(value)));
        }
        return values;
    }
    Numbers float32(size_t count, double scale = 1) {
        Numbers values(count);
        for (double& value : values) {
            value = static_cast<float>(scale * normal_(generator_));
        }
        return values;
    }

private:
    std::mt19937 generator_{7};
    std::normal_distribution<double> normal_;
};

inline void* copy_bfloat16(Device& device, const Numbers& values) {
    std::vector<uint16_t> rounded;
    for (const double value : values) {
        rounded.push_back(to_bfloat16(static_cast<float>(value)));
    }
    return device.copy(rounded);
}

inline void* copy_float32(Device& device, const Numbers& values) {
    return device.copy(std::vector<float>(values.begin(), values.end()));
}

// Memory for results, full of NaN.
inline void* results_of(Device& device, size_t bytes) {
    return device.copy(std::vector<uint8_t>(bytes, 0xff));
}

inline Numbers read_bfloat16(Device& device, const void* memory, size_t count) {
    Numbers values;
    for (const uint16_t value : device.read<uint16_t>(memory, count)) {
        values.push_back(from_bfloat16(value));
    }
    return values;
}

inline Numbers read_float32(Device& device, const void* memory, size_t count) {
    const std::vector<float> values = device.read<float>(memory, count);
    return {values.begin(), values.end()};
}

// Checks that each number is within relative·|wanted| + absolute of the one wanted, and prints the largest error.
inline void check_close(const std::string& what, const Numbers& found, const Numbers& wanted, double relative,
                        double absolute) {
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
        const double error = std::fabs(found[i] - wanted[i]) / (relative * std::fabs(wanted[i]) + absolute);
        if (!(error <= worst)) {  // NaN too
            worst = error;
            at = i;
        }
    }
    std::printf("%-60s %.2f of what is allowed\n", what.c_str(), worst);
    if (found.size() < wanted.size() || !(worst <= 1)) {
        ++failed_checks;
        std::fprintf(stderr, "%s: element %zu is %.9g, wanted %.9g\n", what.c_str(), at, found[at], wanted[at]);
    }
}

// A kernel of the library, for tests in which it has to be there and to launch.
class Kernel {
public:
    Kernel(const char* name, const char* dtype, const char* shape, const char* flags, int architecture, int launch = 0) {
        CHECK_STATUS(nk_find(name, dtype, shape, flags, launch, architecture, &kernel_), NK_OK, "");
    }
    // A constant, or 0 if there is none of this name.
    int64_t constant(const char* name) const {
        double value = 0;
        return nk_constant(kernel_, name, &value) == NK_OK ? static_cast<int64_t>(value) : 0;
    }
    void launch(int64_t x, int64_t y, const std::vector<nk_argument>& arguments) const {
        CHECK_STATUS(nk_launch(kernel_, static_cast<unsigned>(x), static_cast<unsigned>(y), 1, nullptr, arguments.data(),
                               arguments.size()),
                     NK_OK, "");
    }

private:
    const nk_kernel* kernel_ = nullptr;
};

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
