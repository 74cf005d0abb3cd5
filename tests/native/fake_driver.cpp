#include "fake_driver.h"

#include <deque>
#include <mutex>

namespace {

FakeDriver state;
std::mutex guard;
thread_local unsigned long long context = 0;
thread_local std::string last_symbol;
thread_local unsigned last_sizes[6];
thread_local void* last_stream = nullptr;

struct Function {
    FakeModule module;
    std::string symbol;
};

std::deque<FakeModule> modules;  // addresses stay the same
std::deque<Function> functions;

bool fails(const char* function) {
    return state.failing == function;
}

}  // namespace

#define FAIL_IF_WANTED(name)  \
    if (fails(name)) {        \
        return state.failure; \
    }

extern "C" {

FakeDriver* fake_driver() {
    return &state;
}
const char* fake_last_symbol() {
    return last_symbol.c_str();
}
const unsigned* fake_last_sizes() {
    return last_sizes;
}
void* fake_last_stream() {
    return last_stream;
}
void fake_set_context(unsigned long long id) {
    context = id;
}

CUresult cuInit(unsigned) {
    FAIL_IF_WANTED("cuInit")
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = error == CUDA_ERROR_LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : nullptr;
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "a planted failure";
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    FAIL_IF_WANTED("cuDriverGetVersion")
    *version = state.version;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* current) {
    FAIL_IF_WANTED("cuCtxGetCurrent")
    *current = reinterpret_cast<CUcontext>(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetId(CUcontext current, unsigned long long* id) {
    FAIL_IF_WANTED("cuCtxGetId")
    *id = reinterpret_cast<unsigned long long>(current);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    FAIL_IF_WANTED("cuCtxGetDevice")
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    FAIL_IF_WANTED("cuDeviceGetAttribute")
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = state.capability / 10;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = state.capability % 10;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            *value = state.shared;
            return CUDA_SUCCESS;
        default:
            return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* data, unsigned count, CUjit_option* options, void** values) {
    const bool is_cubin = std::memcmp(data, "\177ELF", 4) == 0;
    if (!is_cubin && std::strstr(static_cast<const char*>(data), ".version") == nullptr) {
        return CUDA_ERROR_INVALID_IMAGE;
    }
    if (is_cubin && state.rejects_cubins) {
        return state.rejection;
    }
    if (fails("cuModuleLoadDataEx")) {
        for (unsigned i = 0; i < count; ++i) {
            if (options[i] == CU_JIT_ERROR_LOG_BUFFER) {
                std::strcpy(static_cast<char*>(values[i]), "line 7: a planted error of the JIT");
            }
        }
        return state.failure;
    }
    ++state.loads;
    const std::lock_guard lock(guard);
    *module = reinterpret_cast<CUmodule>(&modules.emplace_back(FakeModule{is_cubin ? "cubin" : "ptx", context}));
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* symbol) {
    FAIL_IF_WANTED("cuModuleGetFunction")
    const std::lock_guard lock(guard);
    *function = reinterpret_cast<CUfunction>(&functions.emplace_back(Function{*reinterpret_cast<FakeModule*>(module), symbol}));
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule) {
    ++state.unloads;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int value) {
    FAIL_IF_WANTED("cuFuncSetAttribute")
    state.requested_shared = value;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache config) {
    FAIL_IF_WANTED("cuFuncSetCacheConfig")
    return config == CU_FUNC_CACHE_PREFER_SHARED ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuLaunchKernel(CUfunction given, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void** parameters, void**) {
    FAIL_IF_WANTED("cuLaunchKernel")
    const auto* function = reinterpret_cast<const Function*>(given);
    if (function->module.context != context) {
        return CUDA_ERROR_INVALID_HANDLE;  // as the real driver does for a function of another context
    }
    ++state.launches;
    last_symbol = function->symbol;
    const unsigned sizes[] = {x, y, z, block_x, block_y, block_z};
    std::memcpy(last_sizes, sizes, sizeof sizes);
    last_stream = stream;
    if (state.on_launch != nullptr) {
        const std::lock_guard lock(guard);
        state.on_launch(
            {{x, y, z}, {block_x, block_y, block_z}, shared, stream, &function->module, function->symbol, parameters});
    }
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* block,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    FAIL_IF_WANTED("cuTensorMapEncodeTiled")
    FakeMap found{type, static_cast<int>(rank), swizzle, interleave, promotion, fill, data, {}, {}, {}, {}};
    std::memcpy(found.sizes, sizes, rank * sizeof *sizes);
    std::memcpy(found.strides, strides, (rank - 1) * sizeof *strides);
    std::memcpy(found.block, block, rank * sizeof *block);
    std::memcpy(found.steps, steps, rank * sizeof *steps);
    std::memset(map, 0xff, sizeof *map);
    const std::lock_guard lock(guard);
    if (state.maps.size() < 64) {
        state.maps.push_back(found);
    }
    return CUDA_SUCCESS;
}

}  // extern "C"
