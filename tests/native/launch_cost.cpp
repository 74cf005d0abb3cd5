// The host's time for a launch: with fake_driver.cpp the library's own, which must be 5 µs at most, and on a GPU with the
// driver's.
#include <algorithm>
#include <chrono>
#include <vector>

#include "check.h"
#include "device.h"
#include "nanochat_kernels.h"

namespace {

constexpr double kMost = 5;  // microseconds

double median_microseconds(const nk_kernel* kernel, const std::vector<nk_argument>& arguments, void (*drain)(Device&),
                           Device* device) {
    std::vector<double> times;
    for (int i = 0; i < 5000; ++i) {
        if (device != nullptr && i % 100 == 0) {
            drain(*device);
        }
        const auto start = std::chrono::steady_clock::now();
        const nk_status status = nk_launch(kernel, 1, 1, 1, nullptr, arguments.data(), arguments.size());
        times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
        CHECK_STATUS(status, NK_OK, "");
    }
    std::nth_element(times.begin(), times.begin() + 2500, times.end());
    return times[2500];
}

int run() {
    void* file = dlopen("libcuda.so.1", RTLD_NOW);
    const auto set_context = file ? reinterpret_cast<void (*)(unsigned long long)>(dlsym(file, "fake_set_context")) : nullptr;
    Device* device = nullptr;
    if (set_context != nullptr) {
        set_context(1);
    } else {
        static Device gpu;
        device = &gpu;
    }
    void* const memory = device ? device->allocate(1 << 20) : reinterpret_cast<void*>(0x10000);
    const nk_kernel *norm = nullptr, *product = nullptr;
    if (nk_find("row_rstd", "bfloat16", "1280", "rstd", 0, 0, &norm) != NK_OK) {
        throw std::runtime_error(nk_last_error());
    }
    const std::vector<nk_argument> few = {nk_pointer(memory, NK_BFLOAT16), nk_pointer(memory, NK_FLOAT32), nk_integer(1),
                                          nk_integer(1280)};
    const auto drain = [](Device& gpu) { gpu.call("cuCtxSynchronize"); };
    const double of_few = median_microseconds(norm, few, drain, device);
    std::printf("%s: 4 arguments %.2f µs", device ? "launch" : "the library's own time", of_few);
    double of_matrices = 0;
    if (nk_find("relu2_mlp_input_gradient", "bfloat16", "16384x1280x5120", "residual", 0, 90, &product) == NK_OK && !device) {
        const nk_matrix matrix = {memory, NK_BFLOAT16, 2, {1280, 1280}, {1280, 1}};
        std::vector<nk_argument> many(5, nk_matrix_argument(&matrix));
        for (const nk_argument& more : {nk_pointer(memory, NK_FLOAT32), nk_integer(1), nk_integer(1280), nk_integer(1280),
                                        nk_integer(1280), nk_integer(16), nk_none()}) {
            many.push_back(more);
        }
        of_matrices = median_microseconds(product, many, drain, device);
        std::printf(", 12 arguments with 5 matrices %.2f µs", of_matrices);
    }
    std::puts("");
    CHECK(device != nullptr || (of_few <= kMost && of_matrices <= kMost));
    return finish();
}

}  // namespace

int main() {
    try {
        return run();
    } catch (const std::exception& error) {
        std::printf("no GPU, or not this kernel: %s\n", error.what());
        return 77;  // skipped, to CTest
    }
}
