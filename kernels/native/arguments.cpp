#include "arguments.h"

#include <cstring>
#include <limits>
#include <utility>

namespace nanochat {
namespace {

constexpr const char* kKinds[] = {"NK_NONE", "NK_POINTER", "NK_INTEGER", "NK_NUMBER", "NK_MATRIX"};
constexpr const char* kDtypes[] = {"no dtype", "bfloat16", "float16", "float32", "float64", "bool",
                                   "uint8",    "int8",     "int16",   "int32",   "int64"};
constexpr int64_t kSizes[] = {1, 2, 2, 4, 8, 1, 1, 1, 2, 4, 8};

template <size_t N>
const char* name_in(const char* const (&names)[N], int32_t number) {
    return number >= 0 && static_cast<size_t>(number) < N ? names[number] : "an unknown value";
}

CUtensorMapDataType element_type(int32_t dtype) {
    switch (dtype) {
        case NK_BFLOAT16:
            return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        case NK_FLOAT16:
            return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        case NK_FLOAT32:
            return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
        default:
            throw Failure{NK_BAD_ARGUMENT, std::string("matrices of ") + kDtypes[dtype] + " cannot be described"};
    }
}

uint64_t address(const void* pointer) {
    return reinterpret_cast<uint64_t>(pointer);
}

// What is wrong with a matrix for the descriptor of a parameter, or "".
std::string matrix_mismatch(const Parameter& parameter, const nk_matrix* matrix) {
    if (matrix == nullptr) {
        return "must not be a null matrix";
    }
    if (matrix->dtype != parameter.dtype) {
        return std::string("must be a matrix of ") + kDtypes[parameter.dtype] + ", got " + name_in(kDtypes, matrix->dtype);
    }
    if (matrix->rank != parameter.rank) {
        return "must have rank " + std::to_string(parameter.rank) + ", got " + std::to_string(matrix->rank);
    }
    if (address(matrix->data) % 16 != 0 || matrix->data == nullptr) {
        return "must begin at a multiple of 16 bytes";
    }
    for (int i = 0; i < parameter.rank; ++i) {
        const bool last = i == parameter.rank - 1;
        if (matrix->shape[i] < 1 || matrix->shape[i] > std::numeric_limits<int32_t>::max()) {
            return "must have sizes of 1 to 2147483647, got " + std::to_string(matrix->shape[i]);
        }
        if (last ? matrix->strides[i] != 1 : matrix->strides[i] < 0 || matrix->strides[i] * kSizes[parameter.dtype] % 16 != 0) {
            return "must have a last stride of 1 and other strides of a multiple of 16 bytes, got " +
                   std::to_string(matrix->strides[i]) + " elements";
        }
    }
    return "";
}

// What is wrong with an argument for a parameter, or "" if it fits.
std::string mismatch(const Parameter& parameter, const nk_argument& argument) {
    const int32_t wanted = kind_of(parameter);
    if (argument.kind != wanted) {
        return std::string("must be ") + kKinds[wanted] + ", got " + name_in(kKinds, argument.kind);
    }
    switch (parameter.kind) {
        case Kind::one:
            return argument.value.integer == 1 ? "" : "must be 1, got " + std::to_string(argument.value.integer);
        case Kind::integer32:
        case Kind::integer64: {
            const int64_t value = argument.value.integer;
            if (parameter.kind == Kind::integer32 && value != static_cast<int32_t>(value)) {
                return "must fit in 32 bits, got " + std::to_string(value);
            }
            return value % parameter.multiple == 0 ? "" : "must be a multiple of 16, got " + std::to_string(value);
        }
        case Kind::pointer: {
            if (argument.value.pointer == nullptr) {
                return "";
            }
            if (argument.dtype != parameter.dtype) {
                return std::string("must point to ") + kDtypes[parameter.dtype] + ", got " + name_in(kDtypes, argument.dtype);
            }
            return address(argument.value.pointer) % parameter.multiple == 0 ? "" : "must be at a multiple of 16 bytes";
        }
        case Kind::matrix:
            return matrix_mismatch(parameter, argument.value.matrix);
        default:
            return "";
    }
}

// Whether a pointer or a matrix has the dtype of a parameter; true for other arguments.
bool same_dtype(const Parameter& parameter, const nk_argument& argument) {
    if (argument.kind == NK_POINTER) {
        return argument.dtype == parameter.dtype;
    }
    return argument.kind != NK_MATRIX || argument.value.matrix == nullptr || argument.value.matrix->dtype == parameter.dtype;
}

}  // namespace

int32_t kind_of(const Parameter& parameter) {
    switch (parameter.kind) {
        case Kind::none:
            return NK_NONE;
        case Kind::pointer:
            return NK_POINTER;
        case Kind::one:
        case Kind::integer32:
        case Kind::integer64:
            return NK_INTEGER;
        case Kind::float32:
        case Kind::float64:
            return NK_NUMBER;
        case Kind::matrix:
            return NK_MATRIX;
    }
    return NK_NONE;
}

const Variant& choose(const nk_kernel& kernel, const nk_argument* arguments, size_t count) {
    // for the message: of the variant that fits longest, if possible one for this dtype, the first argument that does not fit
    const Parameter* unfit = nullptr;
    std::string reason;
    std::pair<size_t, bool> furthest;
    for (uint32_t v = kernel.variant; v < kernel.variant + kernel.variant_count; ++v) {
        const Variant& variant = table.variants[v];
        if (variant.parameter_count != count) {
            throw Failure{NK_BAD_ARGUMENT, std::string(kernel.function) + " takes " + std::to_string(variant.parameter_count) +
                                               " arguments, got " + std::to_string(count)};
        }
        size_t fitting = 0;
        std::string wrong;
        while (fitting < count &&
               (wrong = mismatch(table.parameters[variant.parameter + fitting], arguments[fitting])).empty()) {
            ++fitting;
        }
        if (fitting == count) {
            return variant;
        }
        const Parameter& parameter = table.parameters[variant.parameter + fitting];
        const std::pair<size_t, bool> reached = {fitting, same_dtype(parameter, arguments[fitting])};
        if (reached >= furthest) {
            unfit = &parameter;
            furthest = reached;
            reason = wrong;
        }
    }
    throw Failure{NK_BAD_ARGUMENT, std::string(kernel.function) + ": argument " + std::to_string(furthest.first) + ", " +
                                       unfit->name + ", " + reason + "; no variant in the library takes these arguments"};
}

Packed::Packed(const Driver& driver, const Variant& variant, const nk_argument* arguments) {
    for (uint32_t i = 0; i < variant.parameter_count; ++i) {
        const Parameter& parameter = table.parameters[variant.parameter + i];
        const nk_argument& argument = arguments[i];
        switch (parameter.kind) {
            case Kind::none:
            case Kind::one:
                break;
            case Kind::pointer:
            case Kind::integer64:
            case Kind::float64:
                add_word(&argument.value, 8);
                break;
            case Kind::integer32: {
                const auto value = static_cast<int32_t>(argument.value.integer);
                add_word(&value, sizeof value);
                break;
            }
            case Kind::float32: {
                const auto value = static_cast<float>(argument.value.number);
                add_word(&value, sizeof value);
                break;
            }
            case Kind::matrix:
                add_matrix(driver, parameter, *argument.value.matrix);
        }
    }
    const uint64_t null = 0;
    add_word(&null, sizeof null);  // Triton's scratch memory and that of its profiler, which these kernels do not use
    add_word(&null, sizeof null);
}

void Packed::add_word(const void* value, size_t bytes) {
    if (word_count_ == kWords) {
        throw Failure{NK_BAD_ARGUMENT, "a kernel with more than " + std::to_string(kWords) + " arguments cannot be launched"};
    }
    std::memcpy(&words_[word_count_], value, bytes);
    pointers_[count_++] = &words_[word_count_++];
}

// A descriptor reaches the kernel as a CUtensorMap, its sizes and its strides.
void Packed::add_matrix(const Driver& driver, const Parameter& parameter, const nk_matrix& matrix) {
    if (map_count_ == kMaps) {
        throw Failure{NK_BAD_ARGUMENT, "a kernel with more than " + std::to_string(kMaps) + " matrices cannot be launched"};
    }
    const cuuint32_t rank = parameter.rank;
    const auto size = static_cast<cuuint64_t>(kSizes[parameter.dtype]);
    cuuint64_t sizes[5], strides[5];  // the driver counts dimensions from the last one, and strides in bytes
    cuuint32_t block[5], steps[5];
    cuuint64_t last_byte = 0;
    for (cuuint32_t i = 0; i < rank; ++i) {
        const cuuint32_t from = rank - 1 - i;
        sizes[i] = static_cast<cuuint64_t>(matrix.shape[from]);
        strides[i] = static_cast<cuuint64_t>(matrix.strides[from]) * size;
        block[i] = parameter.block[from];
        steps[i] = 1;
        last_byte += (sizes[i] - 1) * strides[i];
    }
    CUtensorMap& map = maps_[map_count_++];
    driver.check(
        driver.cuTensorMapEncodeTiled(&map, element_type(parameter.dtype), rank, matrix.data, sizes, strides + 1, block, steps,
                                      CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(parameter.swizzle),
                                      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "cuTensorMapEncodeTiled");
    // Drivers up to 13.1 set a bit that is wrong for tensors of less than 128 KiB; CUTLASS and Triton clear it too.
    if (driver.version <= 13010 && last_byte + 1 < 128 * 1024) {
        map.opaque[1] &= ~(1ULL << 21);
    }
    pointers_[count_++] = &map;
    for (cuuint32_t i = 0; i < rank; ++i) {
        const auto value = static_cast<int32_t>(matrix.shape[i]);
        add_word(&value, sizeof value);
    }
    for (cuuint32_t i = 0; i < rank; ++i) {
        add_word(&matrix.strides[i], sizeof matrix.strides[i]);
    }
}

}  // namespace nanochat
