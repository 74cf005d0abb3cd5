#include "driver.h"

#include <dlfcn.h>

#include <mutex>

namespace nanochat {
namespace {

constexpr const char* kFile = "libcuda.so.1";

Driver load() {
    void* file = dlopen(kFile, RTLD_NOW | RTLD_LOCAL);
    if (file == nullptr) {
        throw Failure{NK_NO_DRIVER, std::string("the NVIDIA driver cannot be loaded: ") + dlerror() +
                                        "; run on a machine with a GPU, or add the driver's folder to LD_LIBRARY_PATH"};
    }
    Driver found;
#define NK_LOAD(name)                                                                            \
    found.name = reinterpret_cast<decltype(found.name)>(dlsym(file, NK_SYMBOL(name)));           \
    if (found.name == nullptr) {                                                                 \
        dlclose(file);                                                                           \
        throw Failure{NK_NO_DRIVER, std::string(kFile) + " has no function " + NK_SYMBOL(name) + \
                                        "; a driver for CUDA 12 or newer is wanted"};            \
    }
    NK_DRIVER_FUNCTIONS(NK_LOAD)
#undef NK_LOAD
    const CUresult result = found.cuInit(0);
    if (result == CUDA_ERROR_NO_DEVICE) {
        throw Failure{NK_NO_DEVICE, "the driver finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"};
    }
    found.check(result, "cuInit");
    found.check(found.cuDriverGetVersion(&found.version), "cuDriverGetVersion");
    return found;
}

}  // namespace

void Driver::check(CUresult result, const char* function) const {
    if (result == CUDA_SUCCESS) {
        return;
    }
    const char* name = nullptr;
    const char* text = nullptr;
    if (cuGetErrorName(result, &name) != CUDA_SUCCESS || name == nullptr) {
        name = "an unknown error";
    }
    if (cuGetErrorString(result, &text) != CUDA_SUCCESS || text == nullptr) {
        text = "no description";
    }
    const nk_status status = result == CUDA_ERROR_OUT_OF_MEMORY ? NK_OUT_OF_RESOURCES : NK_DRIVER_ERROR;
    throw Failure{status, std::string(function) + " reports " + name + " (" + std::to_string(result) + "): " + text};
}

const Driver& driver() {
    static std::once_flag once;
    static Driver loaded;
    std::call_once(once, [] { loaded = load(); });  // stays unset if load throws
    return loaded;
}

}  // namespace nanochat
