// Every status code, and what is launched how, with the driver of fake_driver.cpp in place of libcuda.so.1.
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <set>
#include <thread>
#include <vector>

#include "launcher.h"

namespace {

void test_statuses_have_names() {
    std::set<std::string> names;
    for (int status = NK_OK; status <= NK_DRIVER_ERROR; ++status) {
        names.insert(nk_status_name(static_cast<nk_status>(status)));
    }
    CHECK(names.size() == NK_DRIVER_ERROR + 1 && names.count("NK_OK") == 1);
    CHECK(std::string(nk_status_name(static_cast<nk_status>(99))) == "not a status");
    CHECK(nk_version() == NK_VERSION);
}

void test_a_driver_that_fails_to_start() {
    const nk_kernel* found = nullptr;
    driver->failing = "cuInit";
    driver->failure = CUDA_ERROR_NO_DEVICE;
    CHECK_STATUS(nk_find(kNorm[0], kNorm[1], kNorm[2], kNorm[3], 0, 0, &found), NK_NO_DEVICE, "finds no GPU");
    driver->failure = CUDA_ERROR_SYSTEM_NOT_READY;
    CHECK_STATUS(nk_find(kNorm[0], kNorm[1], kNorm[2], kNorm[3], 0, 0, &found), NK_DRIVER_ERROR, "cuInit reports");
    driver->failing.clear();  // a later call tries again
    CHECK_STATUS(nk_find(kNorm[0], kNorm[1], kNorm[2], kNorm[3], 0, 0, &found), NK_NO_CONTEXT, "cudaSetDevice");
}

void test_no_context() {
    set_context(0);
    if (const nk_kernel* kernel = find(kNorm, any_architecture())) {
        CHECK_STATUS(launch(kernel, norm_arguments()), NK_NO_CONTEXT, "cudaSetDevice");
    }
}

void test_finding() {
    reset();
    const nk_kernel* found = nullptr;
    const int known = any_architecture();
    const std::string missing = "no kernel \"row_rst\" for sm_" + std::to_string(known) + "; it has ";
    if (find(kNorm, known) != nullptr) {
        CHECK_STATUS(nk_find("row_rst", "bfloat16", "1280", "rstd", 0, known, &found), NK_UNKNOWN_KERNEL, missing.c_str());
        CHECK_STATUS(nk_find("row_rstd", "float64", "1280", "rstd", 0, known, &found), NK_UNKNOWN_KERNEL,
                     of_all_dtypes() ? "it has bfloat16, float16, float32" : "it has bfloat16");
        CHECK_STATUS(nk_find("row_rstd", "bfloat16", "1281", "rstd", 0, known, &found), NK_UNKNOWN_KERNEL, "no shape \"1281\"");
        CHECK_STATUS(nk_find("row_rstd", "bfloat16", "1280", "x", 0, known, &found), NK_UNKNOWN_KERNEL, "it has rstd");
        CHECK_STATUS(nk_find("row_rstd", "bfloat16", "1280", "rstd", 7, known, &found), NK_UNKNOWN_KERNEL, "no launch 7");
    }
    CHECK_STATUS(nk_find("row_rstd", "bfloat16", "1280", "rstd", 0, 70, &found), NK_UNKNOWN_KERNEL, "for sm_70; it has none");
    CHECK_STATUS(nk_find(nullptr, "bfloat16", "1280", "rstd", 0, known, &found), NK_BAD_ARGUMENT, "kernel must not be null");
    CHECK_STATUS(nk_find("row_rstd", "bfloat16", "1280", "rstd", 0, known, nullptr), NK_BAD_ARGUMENT, "found must not be null");
    CHECK_STATUS(nk_find_id("0123", known, &found), NK_UNKNOWN_KERNEL, "built from other sources");
    CHECK_STATUS(nk_find_id(nullptr, known, &found), NK_BAD_ARGUMENT, "id must not be null");
    const nk_entry* entries = nullptr;
    size_t count = 0;
    CHECK_STATUS(nk_entries(&entries, &count), NK_OK, "");
    CHECK_STATUS(nk_entries(nullptr, &count), NK_BAD_ARGUMENT, "entries");
    CHECK(count > 0);
    for (size_t i = 0; i < count; ++i) {
        const nk_entry& e = entries[i];
        CHECK_STATUS(nk_find(e.kernel, e.dtype, e.shape, e.flags, e.launch, e.architecture, &found), NK_OK, "");
        CHECK(found == e.found);
    }
}

void test_the_code_that_suits_a_gpu() {
    for (const int capability : {80, 86, 90, 100}) {
        reset(capability);
        const int architecture = capability == 90 && has(90) ? 90 : 80;
        if (const nk_kernel* wanted = find(kNorm, architecture)) {
            const nk_kernel* found = nullptr;
            CHECK_STATUS(nk_find(kNorm[0], kNorm[1], kNorm[2], kNorm[3], 0, 0, &found), NK_OK, "");
            CHECK(found == wanted);
        }
    }
}

void test_descriptions() {
    const nk_kernel* kernel = find(kNorm, any_architecture());
    if (kernel == nullptr) {
        return;
    }
    double value = 0;
    CHECK_STATUS(nk_constant(kernel, "WIDTH", &value), NK_OK, "");
    CHECK(value == 1280);
    CHECK_STATUS(nk_constant(kernel, "EPS", &value), NK_OK, "");
    CHECK(std::fabs(value - 1.1920928955078125e-07) < 1e-12);
    CHECK_STATUS(nk_constant(kernel, "HEIGHT", &value), NK_BAD_ARGUMENT, "it has BLOCK, EPS, ROWS, WIDTH");
    CHECK_STATUS(nk_constant(nullptr, "WIDTH", &value), NK_BAD_ARGUMENT, "kernel");
    CHECK_STATUS(nk_constant(kernel, "WIDTH", nullptr), NK_BAD_ARGUMENT, "value");
    const char* function = nullptr;
    size_t variants = 0, count = 0;
    CHECK_STATUS(nk_describe(kernel, &function, &variants), NK_OK, "");
    CHECK(std::string(function) == "row_rstd_kernel" && variants >= 1);
    CHECK_STATUS(nk_describe(kernel, nullptr, &variants), NK_BAD_ARGUMENT, "function");
    nk_parameter parameters[4];
    CHECK_STATUS(nk_parameters(kernel, 0, parameters, 4, &count), NK_OK, "");
    CHECK(count == 4 && std::string(parameters[0].name) == "x_ptr" && parameters[0].kind == NK_POINTER);
    CHECK(parameters[0].multiple == 16 && parameters[1].dtype == NK_FLOAT32 && parameters[3].kind == NK_INTEGER);
    CHECK_STATUS(nk_parameters(kernel, 0, nullptr, 0, &count), NK_OK, "");
    CHECK_STATUS(nk_parameters(kernel, 0, nullptr, 4, &count), NK_BAD_ARGUMENT, "parameters");
    CHECK_STATUS(nk_parameters(kernel, variants, parameters, 4, &count), NK_BAD_ARGUMENT, "was asked for");
}

void test_bad_arguments_of_a_launch() {
    reset();
    const nk_kernel* kernel = find(kNorm, any_architecture());
    if (kernel == nullptr) {
        return;
    }
    CHECK_STATUS(launch(nullptr, norm_arguments()), NK_BAD_ARGUMENT, "kernel must not be null");
    CHECK_STATUS(nk_launch(kernel, 8, 1, 1, nullptr, nullptr, 4), NK_BAD_ARGUMENT, "arguments must not be null");
    CHECK_STATUS(launch(kernel, norm_arguments(), 0), NK_BAD_ARGUMENT, "got 0 by 1 by 1");
    CHECK_STATUS(nk_launch(kernel, 8, 65536, 1, nullptr, norm_arguments().data(), 4), NK_BAD_ARGUMENT, "8 by 65536 by 1");
    CHECK_STATUS(nk_launch(kernel, 8, 1, 65536, nullptr, norm_arguments().data(), 4), NK_BAD_ARGUMENT, "8 by 1 by 65536");
    CHECK_STATUS(launch(kernel, norm_arguments(), 1U << 31), NK_BAD_ARGUMENT, "got 2147483648 by 1 by 1");
    CHECK_STATUS(launch(kernel, {}), NK_BAD_ARGUMENT, "row_rstd_kernel takes 4 arguments, got 0");
    CHECK_STATUS(launch_with(kernel, 0, nk_integer(5)), NK_BAD_ARGUMENT,
                 "argument 0, x_ptr, must be NK_POINTER, got NK_INTEGER");
    CHECK_STATUS(launch_with(kernel, 0, {77, 0, {nullptr}}), NK_BAD_ARGUMENT, "got an unknown value");
    CHECK_STATUS(launch_with(kernel, 0, nk_pointer(kX, NK_INT64)), NK_BAD_ARGUMENT, "got int64");
    CHECK_STATUS(launch_with(kernel, 1, nk_pointer(static_cast<char*>(kRstd) + 4, NK_FLOAT32)), NK_BAD_ARGUMENT,
                 "rstd_ptr, must be at a multiple of 16 bytes");
    for (const nk_dtype dtype : {NK_BFLOAT16, NK_FLOAT16, NK_FLOAT32}) {  // in whatever order the variants for them are
        if (dtype != NK_BFLOAT16 && !of_all_dtypes()) {
            break;
        }
        CHECK_STATUS(launch_with(kernel, 0, nk_pointer(static_cast<char*>(kX) + 8, dtype)), NK_BAD_ARGUMENT,
                     "x_ptr, must be at a multiple of 16 bytes");
    }
    CHECK_STATUS(launch_with(kernel, 2, nk_integer(1LL << 40)), NK_BAD_ARGUMENT,
                 "rows, must fit in 32 bits, got 1099511627776");
    CHECK_STATUS(launch_with(kernel, 2, nk_integer(-(1LL << 40))), NK_BAD_ARGUMENT, "must fit in 32 bits, got -1099511627776");
    CHECK_STATUS(launch_with(kernel, 3, nk_integer(1283)), NK_BAD_ARGUMENT, "x_stride, must be a multiple of 16, got 1283");
    CHECK_STATUS(launch_with(kernel, 3, nk_number(2.5)), NK_BAD_ARGUMENT, "must be NK_INTEGER, got NK_NUMBER");
    CHECK(driver->launches == 0 && driver->loads == 0);
    CHECK_STATUS(launch(kernel, norm_arguments()), NK_OK, "");
    CHECK_STATUS(nk_launch(kernel, (1U << 31) - 1, 65535, 65535, nullptr, norm_arguments().data(), 4), NK_OK, "");
}

void test_a_launch_passes_its_arguments() {
    const int architecture = any_architecture();
    reset(architecture);
    const nk_kernel* norm = find(kNorm, architecture);
    const char* const words[] = {"apply_update", "float32", "1638400", "bfloat16 update, no copy"};
    const nk_kernel* update = find(words, architecture);
    if (norm == nullptr || update == nullptr) {
        return;
    }
    driver->on_launch = [](const FakeLaunch& launch) {
        CHECK(launch.grid[0] == 8 && launch.grid[1] == 2 && launch.grid[2] == 3 && launch.stream == kRstd);
        // 4 warps, which is what Triton takes where a launch gives no num_warps
        CHECK(launch.block[0] == 4 * 32 && launch.block[1] == 1 && launch.block[2] == 1);
        CHECK(launch.symbol == "row_rstd_kernel" && launch.module->code == "cubin");
        CHECK(value_of<void*>(launch, 0) == kX && value_of<void*>(launch, 1) == kRstd);
        CHECK(value_of<int32_t>(launch, 2) == 64 && value_of<int32_t>(launch, 3) == 1280);
        CHECK(value_of<void*>(launch, 4) == nullptr && value_of<void*>(launch, 5) == nullptr);
    };
    CHECK_STATUS(nk_launch(norm, 8, 2, 3, kRstd, norm_arguments().data(), 4), NK_OK, "");
    CHECK(driver->launches == 1);
    driver->on_launch = [](const FakeLaunch& launch) {
        CHECK(value_of<int32_t>(launch, 4) == 1638400 && value_of<float>(launch, 5) == 0.75F);
    };
    CHECK_STATUS(launch(update, {nk_pointer(kX, NK_FLOAT32), nk_pointer(kRstd, NK_BFLOAT16), nk_pointer(nullptr, NK_NO_DTYPE),
                                 nk_pointer(kX, NK_FLOAT32), nk_integer(1638400), nk_number(0.75)}),
                 NK_OK, "");
    CHECK(driver->launches == 2);
}

// The kernel is told where a matrix is by a descriptor, its sizes and its strides.
void test_a_launch_describes_its_matrices() {
    reset(90);
    const nk_kernel* kernel = find(kProduct, 90);
    if (kernel == nullptr) {
        return;
    }
    nk_matrix matrix = {kX, NK_BFLOAT16, 2, {4096, 1280}, {1312, 1}};
    std::vector<nk_argument> arguments = product_arguments(kernel, &matrix);
    driver->on_launch = [](const FakeLaunch& launch) {
        CHECK(value_of<int32_t>(launch, 1) == 4096 && value_of<int32_t>(launch, 2) == 1280);
        CHECK(value_of<int64_t>(launch, 3) == 1312 && value_of<int64_t>(launch, 4) == 1);
        CHECK(reinterpret_cast<uintptr_t>(launch.parameters[0]) % 64 == 0);  // as the driver demands of a descriptor
        CHECK(value_of<uint64_t>(launch, 0) == UINT64_MAX);
        CHECK(static_cast<int>(launch.shared) == driver->requested_shared);
    };
    CHECK_STATUS(launch(kernel, arguments), NK_OK, "");
    CHECK(driver->launches == 1 && driver->maps.size() == 5 && driver->requested_shared > 48 * 1024);
    if (!driver->maps.empty()) {
        const FakeMap& map = driver->maps[0];
        CHECK(map.type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && map.rank == 2 && map.data == kX);
        CHECK(map.sizes[0] == 1280 && map.sizes[1] == 4096 && map.strides[0] == 2624);
        CHECK(map.interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && map.fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
        CHECK(map.promotion == CU_TENSOR_MAP_L2_PROMOTION_L2_128B && map.steps[0] == 1 && map.steps[1] == 1);
        CHECK(map.swizzle == CU_TENSOR_MAP_SWIZZLE_128B && map.block[0] == 64 && map.block[1] >= 64);
    }
    // a driver of version 13.0 sets a bit for small tensors that must not be there
    matrix.shape[0] = 16;
    driver->on_launch = [](const FakeLaunch& launch) {
        CUtensorMap map;
        std::memcpy(&map, launch.parameters[0], sizeof map);
        CHECK(map.opaque[1] == (UINT64_MAX & ~(1ULL << 21)));
    };
    CHECK_STATUS(launch(kernel, arguments), NK_OK, "");
    driver->on_launch = nullptr;

    const nk_matrix good = matrix;
    const auto rejects = [&](const char* words) {
        CHECK_STATUS(launch(kernel, arguments), NK_BAD_ARGUMENT, words);
        matrix = good;
    };
    matrix.data = static_cast<char*>(kX) + 8;
    rejects("must begin at a multiple of 16 bytes");
    matrix.data = nullptr;
    rejects("must begin at a multiple of 16 bytes");
    matrix.dtype = NK_FLOAT32;
    rejects("must be a matrix of bfloat16, got float32");
    matrix.rank = 3;
    rejects("must have rank 2, got 3");
    matrix.shape[1] = 0;
    rejects("must have sizes of 1 to 2147483647, got 0");
    matrix.strides[0] = 1281;
    rejects("other strides of a multiple of 16 bytes, got 1281 elements");
    matrix.strides[1] = 2;
    rejects("must have a last stride of 1");
    arguments[0] = nk_matrix_argument(nullptr);
    rejects("x_desc, must not be a null matrix");
    arguments[0] = nk_matrix_argument(&matrix);
    for (size_t i = 0; i < arguments.size(); ++i) {
        if (arguments[i].kind == NK_NONE) {
            arguments[i] = nk_integer(3);
            rejects("must be NK_NONE, got NK_INTEGER");
            arguments[i] = nk_none();
        } else if (arguments[i].kind == NK_INTEGER && arguments[i].value.integer == 1) {
            arguments[i] = nk_integer(2);
            rejects("must be 1, got 2");
            arguments[i] = nk_integer(1);
        }
    }
    driver->failing = "cuTensorMapEncodeTiled";
    driver->failure = CUDA_ERROR_INVALID_VALUE;
    CHECK_STATUS(launch(kernel, arguments), NK_DRIVER_ERROR, "cuTensorMapEncodeTiled reports");
}

void test_code_for_a_device() {
    const struct {
        int architecture, capability;
        const char* code;
    } cases[] = {{80, 80, "cubin"}, {80, 86, "cubin"}, {80, 90, "ptx"}, {80, 100, "ptx"}, {90, 90, "cubin"}};
    static std::string wanted;
    for (const auto& one : cases) {
        reset(one.capability);
        wanted = one.code;
        driver->on_launch = [](const FakeLaunch& launch) { CHECK(launch.module->code == wanted); };
        if (const nk_kernel* kernel = find(kNorm, one.architecture)) {
            CHECK_STATUS(launch(kernel, norm_arguments()), NK_OK, "");
            CHECK(driver->launches == 1);
        }
    }
    if (const nk_kernel* kernel = find(kNorm, 80)) {
        wanted = "ptx";
        for (const CUresult rejection : {CUDA_ERROR_NO_BINARY_FOR_GPU, CUDA_ERROR_INVALID_IMAGE}) {
            reset(80);
            driver->rejects_cubins = true;
            driver->rejection = rejection;
            driver->on_launch = [](const FakeLaunch& launch) { CHECK(launch.module->code == wanted); };
            CHECK_STATUS(launch(kernel, norm_arguments()), NK_OK, "");
        }
        reset(75);
        CHECK_STATUS(launch(kernel, norm_arguments()), NK_NO_CODE, "compute capability 7.5 cannot run");
    }
    if (const nk_kernel* kernel = find(kNorm, 90)) {
        reset(100);
        CHECK_STATUS(launch(kernel, norm_arguments()), NK_NO_CODE, "take the kernel of architecture 80");
        reset(90);
        driver->rejects_cubins = true;
        CHECK_STATUS(launch(kernel, norm_arguments()), NK_DRIVER_ERROR, "cuModuleLoadDataEx reports");
    }
}

void test_failures_of_the_driver() {
    const nk_kernel* norm = find(kNorm, any_architecture());
    if (norm == nullptr) {
        return;
    }
    for (const char* function : {"cuCtxGetCurrent", "cuCtxGetId", "cuCtxGetDevice", "cuDeviceGetAttribute",
                                 "cuModuleLoadDataEx", "cuModuleGetFunction", "cuLaunchKernel"}) {
        reset();
        driver->failing = function;
        driver->failure = CUDA_ERROR_LAUNCH_FAILED;
        CHECK_STATUS(launch(norm, norm_arguments()), NK_DRIVER_ERROR, function);
        CHECK(std::string(nk_last_error()).find("CUDA_ERROR_LAUNCH_FAILED (719): a planted failure") != std::string::npos);
        driver->failing.clear();
        CHECK_STATUS(launch(norm, norm_arguments()), NK_OK, "");  // it is not the library that is broken
        CHECK(driver->launches == 1);
    }
    reset();
    driver->failing = "cuModuleLoadDataEx";
    driver->failure = CUDA_ERROR_INVALID_PTX;
    CHECK_STATUS(launch(norm, norm_arguments()), NK_DRIVER_ERROR,
                 has(80) ? "line 7: a planted error of the JIT" : "cuModuleLoadDataEx");  // there is no PTX of sm_90
    driver->failure = CUDA_ERROR_OUT_OF_MEMORY;
    CHECK_STATUS(launch(norm, norm_arguments()), NK_OUT_OF_RESOURCES, "cuModuleLoadDataEx");
    reset();
    driver->failing = "cuModuleGetFunction";
    driver->failure = CUDA_ERROR_NOT_FOUND;
    CHECK_STATUS(launch(norm, norm_arguments()), NK_DRIVER_ERROR, "cuModuleGetFunction reports");
    CHECK(driver->loads == 1 && driver->unloads == 1);  // what was loaded is not left behind
    reset(90);
    driver->shared = 100 * 1024;
    const nk_matrix matrix = {kX, NK_BFLOAT16, 2, {4096, 1280}, {1280, 1}};
    const nk_kernel* product = find(kProduct, 90);
    if (product == nullptr) {
        return;
    }
    CHECK_STATUS(launch(product, product_arguments(product, &matrix)), NK_OUT_OF_RESOURCES,
                 "bytes of shared memory, the GPU has 102400");
    driver->shared = 227 * 1024;
    for (const char* function : {"cuFuncSetAttribute", "cuFuncSetCacheConfig"}) {
        driver->failing = function;
        CHECK_STATUS(launch(product, product_arguments(product, &matrix)), NK_DRIVER_ERROR, function);
    }
}

void test_contexts_and_threads() {
    reset(90);
    const nk_kernel* kernel = find(kNorm, any_architecture());
    if (kernel == nullptr) {
        return;
    }
    CHECK_STATUS(launch(kernel, norm_arguments()), NK_OK, "");
    CHECK_STATUS(launch(kernel, norm_arguments()), NK_OK, "");
    CHECK(driver->loads == 1 && driver->launches == 2);
    set_context(7);  // a function of another context would be rejected
    CHECK_STATUS(launch(kernel, norm_arguments()), NK_OK, "");
    CHECK(driver->loads == 2 && driver->launches == 3);

    std::vector<std::thread> threads;
    std::atomic<int> failures{0};
    for (unsigned long long i = 0; i < 8; ++i) {
        threads.emplace_back([&failures, kernel, i] {
            set_context(1000 + i % 2);
            for (int repeat = 0; repeat < 500; ++repeat) {
                failures += launch(kernel, norm_arguments()) != NK_OK;
                failures += launch_with(kernel, 3, nk_integer(static_cast<int64_t>(i) + 1281)) != NK_BAD_ARGUMENT;
                // the message is this thread's own
                failures += std::string(nk_last_error()).find("got " + std::to_string(i + 1281)) == std::string::npos;
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(failures == 0 && driver->loads == 4 && driver->launches == 3 + 8 * 500);
}

}  // namespace

int main() {
    void* file = dlopen("libcuda.so.1", RTLD_NOW);
    const auto get = file ? reinterpret_cast<FakeDriver* (*)()>(dlsym(file, "fake_driver")) : nullptr;
    if (get == nullptr) {
        std::fprintf(stderr, "libcuda.so.1 is not the driver of this test; run it through ctest, which sets LD_LIBRARY_PATH\n");
        return 1;
    }
    driver = get();
    set_context = reinterpret_cast<void (*)(unsigned long long)>(dlsym(file, "fake_set_context"));
    test_statuses_have_names();
    test_a_driver_that_fails_to_start();
    test_no_context();
    test_finding();
    test_the_code_that_suits_a_gpu();
    test_descriptions();
    test_bad_arguments_of_a_launch();
    test_a_launch_passes_its_arguments();
    test_a_launch_describes_its_matrices();
    test_code_for_a_device();
    test_failures_of_the_driver();
    test_contexts_and_threads();
    return finish();
}
