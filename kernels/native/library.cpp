// The functions of nanochat_kernels.h.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "arguments.h"
#include "driver.h"
#include "modules.h"
#include "table.h"

namespace {

using nanochat::Failure;
using nanochat::Parameter;
using nanochat::table;
using nanochat::Variant;

thread_local std::string last_error;

// Runs the body of a function of the interface, and turns what it throws into a status.
template <class Body>
nk_status guarded(Body body) noexcept {
    try {
        body();
        return NK_OK;
    } catch (Failure& failure) {
        last_error.swap(failure.text);
        return failure.status;
    } catch (const std::bad_alloc&) {
        last_error.assign("no memory");  // fits in the string itself
        return NK_OUT_OF_RESOURCES;
    } catch (const std::exception& error) {
        last_error = error.what();
        return NK_DRIVER_ERROR;
    }
}

template <class T>
T& needed(T* pointer, const char* name) {
    if (pointer == nullptr) {
        throw Failure{NK_BAD_ARGUMENT, std::string(name) + " must not be null"};
    }
    return *pointer;
}

// Returns the architecture whose code suits the GPU of the current context: sm_90's runs on 9.0 only, sm_80's PTX on all newer
// ones.
int current_architecture() {
    const auto& driver = nanochat::driver();
    const bool is_hopper = compute_capability(driver, current_context(driver).device) == 90;
    const bool has_90 = std::any_of(table.entries, table.entries + table.entry_count,
                                    [](const nk_entry& entry) { return entry.architecture == 90; });
    return is_hopper && has_90 ? 90 : 80;
}

// Says which of the words of a search is the first that no entry has, with the words that there are.
std::string nearest(const char* const (&wanted)[4], int launch, int architecture) {
    static const char* const names[] = {"kernel", "dtype", "shape", "flags"};
    for (size_t word = 0; word < 4; ++word) {
        std::string known;
        bool found = false;
        for (size_t i = 0; i < table.entry_count; ++i) {
            const nk_entry& entry = table.entries[i];
            const char* const words[] = {entry.kernel, entry.dtype, entry.shape, entry.flags};
            bool same = entry.architecture == architecture;
            for (size_t before = 0; before < word; ++before) {
                same = same && std::strcmp(words[before], wanted[before]) == 0;
            }
            if (same && std::strcmp(words[word], wanted[word]) == 0) {
                found = true;
            } else if (same && (", " + known + ",").find(std::string(", ") + words[word] + ",") == std::string::npos) {
                known += (known.empty() ? "" : ", ") + std::string(words[word]);
            }
        }
        if (!found) {
            return std::string("has no ") + names[word] + " \"" + wanted[word] + "\" for sm_" + std::to_string(architecture) +
                   "; it has " + (known.empty() ? "none" : known);
        }
    }
    return "has these words, but no launch " + std::to_string(launch) + " or not all of them together";
}

}  // namespace

extern "C" {

int nk_version(void) {
    return NK_VERSION;
}

const char* nk_status_name(nk_status status) {
    switch (status) {
        case NK_OK:
            return "NK_OK";
        case NK_BAD_ARGUMENT:
            return "NK_BAD_ARGUMENT";
        case NK_UNKNOWN_KERNEL:
            return "NK_UNKNOWN_KERNEL";
        case NK_NO_DRIVER:
            return "NK_NO_DRIVER";
        case NK_NO_DEVICE:
            return "NK_NO_DEVICE";
        case NK_NO_CONTEXT:
            return "NK_NO_CONTEXT";
        case NK_NO_CODE:
            return "NK_NO_CODE";
        case NK_OUT_OF_RESOURCES:
            return "NK_OUT_OF_RESOURCES";
        case NK_DRIVER_ERROR:
            return "NK_DRIVER_ERROR";
    }
    return "not a status";
}

const char* nk_last_error(void) {
    return last_error.c_str();
}

nk_status nk_entries(const nk_entry** entries, size_t* count) {
    return guarded([&] {
        needed(entries, "entries") = table.entries;
        needed(count, "count") = table.entry_count;
    });
}

nk_status nk_find(const char* kernel, const char* dtype, const char* shape, const char* flags, int launch, int architecture,
                  const nk_kernel** found) {
    return guarded([&] {
        const char* const wanted[] = {&needed(kernel, "kernel"), &needed(dtype, "dtype"), &needed(shape, "shape"),
                                      &needed(flags, "flags")};
        needed(found, "found") = nullptr;
        const int number = architecture == 0 ? current_architecture() : architecture;
        for (size_t i = 0; i < table.entry_count; ++i) {
            const nk_entry& entry = table.entries[i];
            if (entry.architecture == number && entry.launch == launch && std::strcmp(entry.kernel, kernel) == 0 &&
                std::strcmp(entry.dtype, dtype) == 0 && std::strcmp(entry.shape, shape) == 0 &&
                std::strcmp(entry.flags, flags) == 0) {
                *found = entry.found;
                return;
            }
        }
        throw Failure{NK_UNKNOWN_KERNEL, "the library " + nearest(wanted, launch, number)};
    });
}

nk_status nk_find_id(const char* id, int architecture, const nk_kernel** found) {
    return guarded([&] {
        needed(id, "id");
        needed(found, "found") = nullptr;
        for (size_t i = 0; i < table.kernel_count && *found == nullptr; ++i) {
            const nk_kernel& kernel = table.kernels[i];
            if (kernel.architecture == architecture && std::strcmp(kernel.id, id) == 0) {
                *found = &kernel;
            }
        }
        if (*found == nullptr) {
            throw Failure{NK_UNKNOWN_KERNEL, std::string("the library has no kernel with the id ") + id + " for sm_" +
                                                 std::to_string(architecture) +
                                                 "; it was built from other sources, or not for this shape"};
        }
    });
}

nk_status nk_constant(const nk_kernel* kernel, const char* name, double* value) {
    return guarded([&] {
        const nk_kernel& one = needed(kernel, "kernel");
        needed(name, "name");
        double& stored = needed(value, "value");
        std::string known;
        for (uint32_t i = one.constant; i < one.constant + one.constant_count; ++i) {
            if (std::strcmp(table.constants[i].name, name) == 0) {
                stored = table.constants[i].value;
                return;
            }
            known += (known.empty() ? "" : ", ") + std::string(table.constants[i].name);
        }
        throw Failure{NK_BAD_ARGUMENT,
                      std::string(one.function) + " has no constant \"" + name + "\" that is a number; it has " + known};
    });
}

nk_status nk_describe(const nk_kernel* kernel, const char** function, size_t* variants) {
    return guarded([&] {
        const nk_kernel& one = needed(kernel, "kernel");
        needed(function, "function") = one.function;
        needed(variants, "variants") = one.variant_count;
    });
}

nk_status nk_parameters(const nk_kernel* kernel, size_t variant, nk_parameter* parameters, size_t capacity, size_t* count) {
    return guarded([&] {
        const nk_kernel& one = needed(kernel, "kernel");
        if (variant >= one.variant_count) {
            throw Failure{NK_BAD_ARGUMENT, std::string(one.function) + " has " + std::to_string(one.variant_count) +
                                               " variants, variant " + std::to_string(variant) + " was asked for"};
        }
        const Variant& chosen = table.variants[one.variant + variant];
        needed(count, "count") = chosen.parameter_count;
        for (size_t i = 0; i < chosen.parameter_count && i < capacity; ++i) {
            const Parameter& from = table.parameters[chosen.parameter + i];
            (&needed(parameters, "parameters"))[i] = {from.name, nanochat::kind_of(from), from.dtype, from.multiple,
                                                      from.kind == nanochat::Kind::one ? 1 : 0};
        }
    });
}

nk_status nk_launch(const nk_kernel* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, void* stream,
                    const nk_argument* arguments, size_t count) {
    return guarded([&] {
        const nk_kernel& one = needed(kernel, "kernel");
        if (count != 0) {
            needed(arguments, "arguments");
        }
        if (grid_x < 1 || grid_x > 0x7fffffffU || grid_y < 1 || grid_y > 65535 || grid_z < 1 || grid_z > 65535) {
            throw Failure{NK_BAD_ARGUMENT, "the grid must be 1 to 2147483647 by 1 to 65535 by 1 to 65535, got " +
                                               std::to_string(grid_x) + " by " + std::to_string(grid_y) + " by " +
                                               std::to_string(grid_z)};
        }
        const Variant& variant = nanochat::choose(one, arguments, count);
        const auto& driver = nanochat::driver();
        CUfunction function = function_of(driver, current_context(driver), one, variant);
        nanochat::Packed packed(driver, variant, arguments);
        driver.check(driver.cuLaunchKernel(function, grid_x, grid_y, grid_z, 32 * variant.warps, 1, 1, variant.shared,
                                           static_cast<CUstream>(stream), packed.parameters(), nullptr),
                     "cuLaunchKernel");
    });
}

}  // extern "C"
