// Computes 1/√(mean(x²) + ε) of every row of a matrix with a kernel of the library, and compares it with plain C++.
//
// Without a GPU it shows what the library contains and why it cannot launch.
#include <cmath>
#include <cstdio>
#include <optional>
#include <random>
#include <utility>

#include "device.h"
#include "nanochat_kernels.h"

namespace {

constexpr int kRows = 4096, kWidth = 1280;

// Prints what went wrong and returns the status of the program.
int failed(const char* what, nk_status status) {
    std::fprintf(stderr, "%s: %s, %s\n", what, nk_status_name(status), nk_last_error());
    return 1;
}

int run() {
    const nk_entry* entries = nullptr;
    size_t count = 0;
    if (const nk_status status = nk_entries(&entries, &count)) {
        return failed("nk_entries", status);
    }
    std::printf("the library has code for %zu launches\n", count);

    std::optional<Device> gpu;
    try {
        gpu.emplace();
    } catch (const std::exception& error) {
        std::printf("no GPU: %s\n", error.what());
        return 77;  // skipped, to CTest
    }
    Device& device = *gpu;
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> x(static_cast<size_t>(kRows) * kWidth);
    for (uint16_t& value : x) {
        value = to_bfloat16(normal(generator));
    }
    void* const x_ptr = device.copy(x);
    void* const rstd_ptr = device.allocate(kRows * sizeof(float));

    const nk_kernel* kernel = nullptr;
    double rows_of_a_program = 0, epsilon = 0;
    if (const nk_status status = nk_find("row_rstd", "bfloat16", "1280", "rstd", 0, 0, &kernel)) {
        return failed("nk_find", status);
    }
    for (const auto& [name, value] : {std::pair("ROWS", &rows_of_a_program), std::pair("EPS", &epsilon)}) {
        if (const nk_status status = nk_constant(kernel, name, value)) {
            return failed("nk_constant", status);
        }
    }
    const auto grid = static_cast<unsigned>(std::ceil(kRows / rows_of_a_program));
    const nk_argument arguments[] = {nk_pointer(x_ptr, NK_BFLOAT16), nk_pointer(rstd_ptr, NK_FLOAT32), nk_integer(kRows),
                                     nk_integer(kWidth)};
    if (const nk_status status = nk_launch(kernel, grid, 1, 1, nullptr, arguments, 4)) {
        return failed("nk_launch", status);
    }

    const std::vector<float> rstd = device.read<float>(rstd_ptr, kRows);
    double worst = 0;
    for (int row = 0; row < kRows; ++row) {
        double sum = 0;
        for (int i = 0; i < kWidth; ++i) {
            const double value = from_bfloat16(x[static_cast<size_t>(row) * kWidth + i]);
            sum += value * value;
        }
        worst = std::fmax(worst, std::fabs(rstd[row] * std::sqrt(sum / kWidth + epsilon) - 1));
    }
    std::printf("largest relative error of %d rows: %.2g\n", kRows, worst);
    return worst < 1e-5 ? 0 : 1;
}

}  // namespace

int main() {
    try {
        return run();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
