// What status_test.cpp launches, and the driver that sees it.
#pragma once

#include <algorithm>
#include <vector>

#include "check.h"
#include "fake_driver.h"
#include "nanochat_kernels.h"

inline FakeDriver* driver;
inline void (*set_context)(unsigned long long);

inline void* const kX = reinterpret_cast<void*>(0x10000);
inline void* const kRstd = reinterpret_cast<void*>(0x20000);
inline const char* const kNorm[] = {"row_rstd", "bfloat16", "1280", "rstd"};
inline const char* const kNormInFloat16[] = {"row_rstd", "float16", "1280", "rstd"};
inline const char* const kProduct[] = {"relu2_mlp_input_gradient", "bfloat16", "65536x1280x5120", "residual"};

// Whether the library has an entry for an architecture, with these words if they are given.
inline bool has(int architecture, const char* const* words = nullptr) {
    const nk_entry* entries = nullptr;
    size_t count = 0;
    CHECK_STATUS(nk_entries(&entries, &count), NK_OK, "");
    return std::any_of(entries, entries + count, [=](const nk_entry& e) {
        const std::string given[] = {e.kernel, e.dtype, e.shape, e.flags};
        return e.architecture == architecture && (words == nullptr || std::equal(given, given + 4, words));
    });
}

// Returns a kernel, or nullptr after a line that says that the library was built without it.
inline const nk_kernel* find(const char* const (&words)[4], int architecture) {
    const nk_kernel* found = nullptr;
    if (has(architecture, words)) {
        CHECK_STATUS(nk_find(words[0], words[1], words[2], words[3], 0, architecture, &found), NK_OK, "");
    } else {
        std::printf("skipped: the library was built without %s for sm_%d\n", words[0], architecture);
    }
    return found;
}

// An architecture that the library was built for.
inline int any_architecture() {
    return has(80) ? 80 : 90;
}

// Whether the library was built without NANOCHAT_TRAINING_ONLY.
inline bool of_all_dtypes() {
    return has(any_architecture(), kNormInFloat16);
}

inline std::vector<nk_argument> norm_arguments(int64_t rows = 64, int64_t stride = 1280) {
    return {nk_pointer(kX, NK_BFLOAT16), nk_pointer(kRstd, NK_FLOAT32), nk_integer(rows), nk_integer(stride)};
}

inline nk_status launch(const nk_kernel* kernel, const std::vector<nk_argument>& arguments, unsigned grid = 8) {
    return nk_launch(kernel, grid, 1, 1, nullptr, arguments.data(), arguments.size());
}

inline nk_status launch_with(const nk_kernel* kernel, size_t position, nk_argument argument) {
    std::vector<nk_argument> arguments = norm_arguments();
    arguments[position] = argument;
    return launch(kernel, arguments);
}

// Arguments that the first variant takes, with the same matrix for all of its matrices.
inline std::vector<nk_argument> product_arguments(const nk_kernel* kernel, const nk_matrix* matrix) {
    nk_parameter parameters[32];
    size_t count = 0;
    CHECK_STATUS(nk_parameters(kernel, 0, parameters, 32, &count), NK_OK, "");
    std::vector<nk_argument> arguments;
    for (size_t i = 0; i < count; ++i) {
        const nk_parameter& parameter = parameters[i];
        switch (parameter.kind) {
            case NK_MATRIX:
                arguments.push_back(nk_matrix_argument(matrix));
                break;
            case NK_POINTER:
                arguments.push_back(nk_pointer(kRstd, static_cast<nk_dtype>(parameter.dtype)));
                break;
            case NK_INTEGER:
                arguments.push_back(nk_integer(parameter.value != 0 ? parameter.value : 16));
                break;
            default:
                arguments.push_back(nk_none());
        }
    }
    return arguments;
}

template <class T>
T value_of(const FakeLaunch& launch, size_t position) {
    T value;
    std::memcpy(&value, launch.parameters[position], sizeof value);
    return value;
}

inline void reset(int capability = 90) {
    driver->capability = capability;
    driver->shared = 227 * 1024;
    driver->failing.clear();
    driver->rejects_cubins = false;
    driver->on_launch = nullptr;
    driver->maps.clear();
    driver->loads = driver->unloads = driver->launches = 0;
    static unsigned long long next = 100;
    set_context(next += 1);  // nothing is loaded in a new context
}
