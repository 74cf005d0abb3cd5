// A GPU for programs that have neither the CUDA toolkit nor its headers: context, memory and copies through the driver.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

class Device {
public:
    // Makes the primary context of the first GPU current. Throws std::runtime_error if there is none.
    Device() {
        file_ = dlopen("libcuda.so.1", RTLD_NOW);
        if (file_ == nullptr) {
            throw std::runtime_error(dlerror());
        }
        int device = 0;
        void* context = nullptr;
        call("cuInit", 0U);
        call("cuDeviceGet", &device, 0);
        call("cuDevicePrimaryCtxRetain", &context, device);
        call("cuCtxSetCurrent", context);
        call("cuDeviceGetAttribute", &multiprocessors_, 16, device);  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    ~Device() {
        for (const uint64_t address : allocated_) {
            function<uint64_t>("cuMemFree_v2")(address);
        }
    }

    int multiprocessors() const { return multiprocessors_; }

    void* allocate(size_t bytes) {
        uint64_t address = 0;
        call("cuMemAlloc_v2", &address, bytes);
        allocated_.push_back(address);
        return reinterpret_cast<void*>(address);
    }

    // Copies a vector to new memory on the device.
    template <class T>
    void* copy(const std::vector<T>& values) {
        void* memory = allocate(values.size() * sizeof(T));
        call("cuMemcpyHtoD_v2", reinterpret_cast<uint64_t>(memory), static_cast<const void*>(values.data()),
             values.size() * sizeof(T));
        return memory;
    }

    // Waits for all work, and copies `count` values from the device.
    template <class T>
    std::vector<T> read(const void* memory, size_t count) {
        std::vector<T> values(count);
        call("cuCtxSynchronize");
        call("cuMemcpyDtoH_v2", static_cast<void*>(values.data()), reinterpret_cast<uint64_t>(memory), count * sizeof(T));
        return values;
    }

    template <class... Arguments>
    void call(const char* name, Arguments... arguments) {
        const int result = function<Arguments...>(name)(arguments...);
        if (result != 0) {
            throw std::runtime_error(std::string(name) + " reports the CUDA error " + std::to_string(result));
        }
    }

private:
    template <class... Arguments>
    int (*function(const char* name))(Arguments...) {
        void* found = dlsym(file_, name);
        if (found == nullptr) {
            throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
        }
        return reinterpret_cast<int (*)(Arguments...)>(found);
    }

    void* file_ = nullptr;
    int multiprocessors_ = 0;
    std::vector<uint64_t> allocated_;
};

// bfloat16 numbers as their upper 16 bits, rounded to nearest even.
inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}
