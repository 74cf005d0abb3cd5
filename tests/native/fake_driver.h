// A libcuda.so.1 without a GPU: it records what it is asked to do, and fails where a test wants it to.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

struct FakeModule {
    std::string code;  // "cubin" or "ptx"
    unsigned long long context;
};

struct FakeLaunch {
    unsigned grid[3], block[3], shared;
    void* stream;
    const FakeModule* module;
    std::string symbol;
    void** parameters;  // valid while the launch is recorded
};

struct FakeMap {
    int type, rank, swizzle, interleave, promotion, fill;
    void* data;
    cuuint64_t sizes[5], strides[5];
    cuuint32_t block[5], steps[5];
};

struct FakeDriver {
    int capability = 90;
    int shared = 227 * 1024;
    int version = 13000;
    std::string failing;  // the function that returns `failure`
    CUresult failure = CUDA_SUCCESS;
    bool rejects_cubins = false;
    CUresult rejection = CUDA_ERROR_NO_BINARY_FOR_GPU;
    std::atomic<int> loads{0}, unloads{0}, launches{0};
    int requested_shared = 0;
    void (*on_launch)(const FakeLaunch&) = nullptr;
    std::vector<FakeMap> maps;
};

extern "C" FakeDriver* fake_driver();
extern "C" void fake_set_context(unsigned long long id);  // of the calling thread; 0 for none
// What this thread launched last: the function, its grid and the threads of a block (x, y, z each), and its stream.
extern "C" const char* fake_last_symbol();
extern "C" const unsigned* fake_last_sizes();
extern "C" void* fake_last_stream();
