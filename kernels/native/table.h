// What python -m nanochat_kernels export writes for the library: kernels, their variants, and where their code is.
#pragma once

#include <cstdint>

#include "nanochat_kernels.h"

extern "C" const unsigned char nk_code[];  // code.bin, see code.S

namespace nanochat {

enum class Kind : uint8_t { none, one, pointer, integer32, integer64, float32, float64, matrix };

struct Parameter {
    const char* name;
    Kind kind;  // none and one: an argument that was compiled in
    uint8_t dtype;
    uint8_t multiple;  // 1 or 16: what an integer or an address is divisible by
    // of a matrix: the rank and block of its descriptor, and its CUtensorMapSwizzle
    uint8_t rank;
    uint8_t swizzle;
    uint16_t block[5];
};

struct Code {
    uint64_t offset;
    uint32_t size;  // 0: not in the library
};

struct Variant {
    const char* symbol;
    uint32_t parameter, parameter_count;
    Code cubin, ptx;
    uint32_t warps, shared, registers, spilled;
};

struct Constant {
    const char* name;
    double value;
};

struct Table {
    const Constant* constants;
    const Parameter* parameters;
    const Variant* variants;
    const nk_kernel* kernels;
    size_t kernel_count;
    const nk_entry* entries;
    size_t entry_count;
    const unsigned char* code;
};

extern const Table table;

}  // namespace nanochat

struct nk_kernel {
    const char* id;
    const char* function;
    int architecture;
    uint32_t constant, constant_count;
    uint32_t variant, variant_count;
};
