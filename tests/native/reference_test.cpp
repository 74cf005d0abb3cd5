// Every kernel of the library against plain C++.
//
//   reference_test FILE    on a GPU, with the launches that tests/native/references.py has written for this library
//
// sm_80's code runs on every GPU since the A100, as a cubin or as PTX; sm_90's on an H100 or H200. Without a GPU
// tests/native/references.py calls check_references: the launches are made with the fake driver, and Triton's interpreter
// computes the results.
#include <fstream>
#include <map>

#include "reference.h"
#include "references_attention.h"
#include "references_loss.h"
#include "references_norms.h"
#include "references_optimizer.h"
#include "references_products.h"
#include "references_sampling.h"

namespace {

const std::map<std::string, void (*)(Case&)> kReferences = {
    {"adamw", adamw},
    {"apply_update", apply_update},
    {"attention_decode", attention_forward},
    {"attention_forward", attention_forward},
    {"attention_key_gradients", attention_key_gradients},
    {"attention_query_gradient", attention_query_gradient},
    {"cache_append", cache_append},
    {"cross_entropy_exponentials", cross_entropy_exponentials},
    {"cross_entropy_gradient", [](Case& c) { loss_of_logits(c, 1e-5); }},
    {"cross_entropy_on_chip", [](Case& c) { loss_of_logits(c, 1.0 / 2048); }},  // E is kept with 10 bits of fraction
    {"cross_entropy_rows", cross_entropy_rows},
    {"cross_entropy_sums", [](Case& c) { loss_of_logits(c, 1e-5); }},
    {"cross_entropy_target_rows", cross_entropy_target_rows},
    {"finish_rows", finish_rows},
    {"linear_cross_entropy_input_gradient", scaled_rows},
    {"linear_cross_entropy_logits", scaled_rows},
    {"matrix_product", [](Case& c) { scaled_product(c, false); }},
    {"matrix_scale", matrix_scale},
    {"matrix_squares", matrix_squares},
    {"nesterov_momentum", nesterov_momentum},
    {"output_projection", residual},
    {"output_projection_few_rows", residual},
    {"output_projection_input_gradient", scaled_rows},
    {"qk_norm_rope_backward", qk_norm_rope_backward},
    {"qk_norm_rope_forward", qk_norm_rope_forward},
    {"qkv_backward", qkv_backward},
    {"qkv_projection", qkv_projection},
    {"qkv_projection_few_rows", qkv_projection},
    {"qkv_projection_input_gradient", norm_backward},
    {"relu2_mlp_down", residual},
    {"relu2_mlp_down_few_rows", residual},
    {"relu2_mlp_hidden_gradient", relu2_mlp_hidden_gradient},
    {"relu2_mlp_input_gradient", norm_backward},
    {"relu2_mlp_up", relu2_mlp_up},
    {"relu2_mlp_up_few_rows", relu2_mlp_up},
    {"rms_norm_backward", rms_norm_backward},
    {"rms_norm_forward", rms_norm_forward},
    {"row_rstd", row_rstd},
    {"sample_tokens_choice", sample_tokens_choice},
    {"sample_tokens_groups", sample_tokens_groups},
    {"softcapped_logits_few_rows", softcapped_logits},
    {"symmetric_product", [](Case& c) { scaled_product(c, true); }},
};

// Launches on memories of the device that are as the case's on the host, pointer by pointer.
void launch(const Case& c, const std::vector<void*>& memories) {
    for (const Launch& one : c.launches) {
        std::vector<nk_matrix> matrices(one.arguments.size());
        std::vector<nk_argument> arguments;
        for (size_t i = 0; i < one.arguments.size(); ++i) {
            const Argument& from = one.arguments[i];
            const auto dtype = static_cast<nk_dtype>(from.dtype);
            if (from.kind == "none") {
                arguments.push_back(nk_none());
            } else if (from.kind == "integer") {
                arguments.push_back(nk_integer(from.integer));
            } else if (from.kind == "number") {
                arguments.push_back(nk_number(from.number));
            } else {
                void* const data = static_cast<uint8_t*>(memories[from.memory]) + from.offset * kSizes[dtype];
                matrices[i] = {data, dtype, static_cast<int32_t>(from.shape.size()), {}, {}};
                std::copy(from.shape.begin(), from.shape.end(), matrices[i].shape);
                std::copy(from.strides.begin(), from.strides.end(), matrices[i].strides);
                arguments.push_back(from.kind == "matrix" ? nk_matrix_argument(&matrices[i]) : nk_pointer(data, dtype));
            }
        }
        CHECK_STATUS(nk_launch(one.kernel, one.grid[0], one.grid[1], one.grid[2], nullptr, arguments.data(), arguments.size()),
                     NK_OK, "");
    }
}

bool run_on_gpu(Case& c) {
    Device device;
    std::vector<void*> memories;
    for (const Bytes& memory : c.memories) {
        memories.push_back(device.copy(memory));
    }
    launch(c, memories);
    for (size_t i = 0; i < memories.size(); ++i) {
        c.memories[i] = device.read<uint8_t>(memories[i], c.memories[i].size());
    }
    return true;
}

// Checks all cases of a file for architectures up to `most`, and that each kernel of the library for these has one.
void check_cases(const char* path, int most, const Run& run) {
    std::ifstream file(path);
    if (!file) {
        throw std::runtime_error(std::string(path) + " cannot be read; python -m tests.native.references writes it");
    }
    std::set<std::pair<std::string, int>> covered;
    std::set<std::string> known, checked;
    for (Case c; c.read(file); c = Case()) {
        if (c.architecture > most) {
            continue;
        }
        c.run_launches = run;
        covered.emplace(c.kernel, c.architecture);
        known.insert(c.kernel);
        const auto reference = kReferences.find(c.kernel);
        try {
            if (reference == kReferences.end()) {
                throw std::runtime_error("reference_test.cpp has no reference of it");
            }
            const int failed_before = failed_checks;
            c.find_kernels();
            if (failed_checks == failed_before) {
                reference->second(c);
            }
            if (c.checked > 0) {
                checked.insert(c.kernel);
            }
        } catch (const std::exception& error) {
            ++failed_checks;
            std::fprintf(stderr, "%s%s: %s\n", c.kernel.c_str(), c.flags.c_str(), error.what());
        }
    }
    for (const std::string& kernel : known) {
        if (checked.count(kernel) == 0) {
            ++failed_checks;
            std::fprintf(stderr, "%s: no case was computed and compared\n", kernel.c_str());
        }
    }
    const nk_entry* entries = nullptr;
    size_t count = 0;
    CHECK_STATUS(nk_entries(&entries, &count), NK_OK, "");
    for (size_t i = 0; i < count; ++i) {
        if (entries[i].architecture <= most && covered.emplace(entries[i].kernel, entries[i].architecture).second) {
            ++failed_checks;
            std::fprintf(stderr, "%s has no case for sm_%d\n", entries[i].kernel, entries[i].architecture);
        }
    }
}

}  // namespace

// Checks the references without a GPU: compute(architecture, number, memories) makes the launches of a case, and returns
// whether it can. Returns how many checks failed.
extern "C" NK_API int check_references(const char* path, int (*compute)(int, int, void* const*)) {
    try {
        check_cases(path, 90, [&](Case& c) {
            std::vector<void*> memories;
            for (Bytes& memory : c.memories) {
                memories.push_back(memory.data());
            }
            launch(c, memories);
            return compute(c.architecture, c.number, memories.data()) != 0;
        });
    } catch (const std::exception& error) {
        ++failed_checks;
        std::fprintf(stderr, "%s\n", error.what());
    }
    return failed_checks;
}

int main(int count, char** arguments) {
    if (count != 2) {
        std::fprintf(stderr, "usage: reference_test FILE\n");
        return 2;
    }
    int capability = 0;
    try {
        Device device;
        device.call("cuDeviceGetAttribute", &capability, 75, 0);  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    } catch (const std::exception& error) {
        std::printf("no GPU: %s\n", error.what());
        return 77;  // skipped, to CTest
    }
    try {
        check_cases(arguments[1], capability == 9 ? 90 : 80, run_on_gpu);
    } catch (const std::exception& error) {
        ++failed_checks;
        std::fprintf(stderr, "%s\n", error.what());
    }
    return finish();
}
