// The functions of libcuda.so.1 that launches need, loaded at run time.
#pragma once

#include <cuda.h>

#include <string>

#include "nanochat_kernels.h"

namespace nanochat {

// A failure: what nk_last_error says, and the status.
struct Failure {
    nk_status status;
    std::string text;
};

#define NK_STRING_OF(name) #name
#define NK_SYMBOL(name) NK_STRING_OF(name)  // cuda.h maps some names to versions, as in cuCtxGetDevice_v2

#define NK_DRIVER_FUNCTIONS(X) \
    X(cuInit)                  \
    X(cuGetErrorName)          \
    X(cuGetErrorString)        \
    X(cuDriverGetVersion)      \
    X(cuCtxGetCurrent)         \
    X(cuCtxGetId)              \
    X(cuCtxGetDevice)          \
    X(cuDeviceGetAttribute)    \
    X(cuModuleLoadDataEx)      \
    X(cuModuleGetFunction)     \
    X(cuModuleUnload)          \
    X(cuFuncSetAttribute)      \
    X(cuFuncSetCacheConfig)    \
    X(cuLaunchKernel)          \
    X(cuTensorMapEncodeTiled)

struct Driver {
#define NK_MEMBER(name) decltype(&::name) name = nullptr;
    NK_DRIVER_FUNCTIONS(NK_MEMBER)
#undef NK_MEMBER
    int version = 0;

    // Throws a Failure that says which function failed and why, unless the result is CUDA_SUCCESS.
    void check(CUresult result, const char* function) const;
};

// Returns the driver, loaded at the first call. Throws a Failure if there is none; a later call tries again.
const Driver& driver();

}  // namespace nanochat
