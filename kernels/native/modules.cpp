#include "modules.h"

#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

namespace nanochat {
namespace {

constexpr uint32_t kSharedWithoutRequest = 48 * 1024;  // bytes of a block; a function asks for more

int attribute(const Driver& driver, CUdevice_attribute which, CUdevice device) {
    int value = 0;
    driver.check(driver.cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
    return value;
}

// Whether a cubin of an architecture runs on a device: sm_80's on 8.0 and the later 8.x, sm_90a's on 9.0 only.
bool runs_cubin(int architecture, int capability) {
    return architecture == 90 ? capability == 90 : capability / 10 == architecture / 10 && capability >= architecture;
}

CUmodule load_module(const Driver& driver, const nk_kernel& kernel, const Variant& variant, int capability) {
    CUmodule module = nullptr;
    if (variant.cubin.size != 0 && runs_cubin(kernel.architecture, capability)) {
        const CUresult result = driver.cuModuleLoadDataEx(&module, table.code + variant.cubin.offset, 0, nullptr, nullptr);
        const bool rejected = result == CUDA_ERROR_NO_BINARY_FOR_GPU || result == CUDA_ERROR_INVALID_IMAGE;
        if (!rejected || variant.ptx.size == 0) {
            driver.check(result, "cuModuleLoadDataEx");
            return module;
        }
    }
    if (variant.ptx.size == 0 || capability < kernel.architecture) {
        throw Failure{NK_NO_CODE, std::string(kernel.function) + " is compiled for sm_" + std::to_string(kernel.architecture) +
                                      ", which the GPU with compute capability " + std::to_string(capability / 10) + "." +
                                      std::to_string(capability % 10) +
                                      " cannot run; take the kernel of architecture 80, or a newer GPU"};
    }
    char log[4096] = "";
    CUjit_option options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    void* values[] = {log, reinterpret_cast<void*>(sizeof log)};
    const CUresult result = driver.cuModuleLoadDataEx(&module, table.code + variant.ptx.offset, 2, options, values);
    log[sizeof log - 1] = 0;
    driver.check(result, (std::string("cuModuleLoadDataEx of PTX") + (log[0] ? std::string(" (") + log + ")" : "")).c_str());
    return module;
}

CUfunction load(const Driver& driver, CUdevice device, const nk_kernel& kernel, const Variant& variant) {
    const auto available =
        static_cast<uint32_t>(attribute(driver, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device));
    if (variant.shared > available) {
        throw Failure{NK_OUT_OF_RESOURCES, std::string(kernel.function) + " needs " + std::to_string(variant.shared) +
                                               " bytes of shared memory, the GPU has " + std::to_string(available)};
    }
    CUmodule module = load_module(driver, kernel, variant, compute_capability(driver, device));
    try {
        CUfunction function = nullptr;
        driver.check(driver.cuModuleGetFunction(&function, module, variant.symbol), "cuModuleGetFunction");
        if (variant.shared > kSharedWithoutRequest) {
            driver.check(driver.cuFuncSetCacheConfig(function, CU_FUNC_CACHE_PREFER_SHARED), "cuFuncSetCacheConfig");
            driver.check(driver.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                   static_cast<int>(variant.shared)),
                         "cuFuncSetAttribute");
        }
        return function;
    } catch (const Failure&) {
        driver.cuModuleUnload(module);
        throw;
    }
}

}  // namespace

Context current_context(const Driver& driver) {
    CUcontext current = nullptr;
    driver.check(driver.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
    if (current == nullptr) {
        throw Failure{NK_NO_CONTEXT, "no CUDA context is current in this thread; call cudaSetDevice or cuCtxSetCurrent first"};
    }
    Context context{};
    driver.check(driver.cuCtxGetId(current, &context.id), "cuCtxGetId");
    driver.check(driver.cuCtxGetDevice(&context.device), "cuCtxGetDevice");
    return context;
}

int compute_capability(const Driver& driver, CUdevice device) {
    return 10 * attribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device) +
           attribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
}

CUfunction function_of(const Driver& driver, const Context& context, const nk_kernel& kernel, const Variant& variant) {
    // Never destroyed: threads may still launch while the process ends.
    static auto& functions = *new std::map<std::pair<unsigned long long, const Variant*>, CUfunction>;
    static auto& guard = *new std::shared_mutex;
    const std::pair key(context.id, &variant);
    {
        const std::shared_lock lock(guard);
        if (const auto known = functions.find(key); known != functions.end()) {
            return known->second;
        }
    }
    const std::unique_lock lock(guard);
    if (const auto known = functions.find(key); known != functions.end()) {
        return known->second;  // another thread was faster
    }
    CUfunction function = load(driver, context.device, kernel, variant);
    functions.emplace(key, function);
    return function;
}

}  // namespace nanochat
