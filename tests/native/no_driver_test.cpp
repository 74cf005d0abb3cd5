// Without a driver everything works that needs none, and the rest says why it does not. argv[1]: words of the message.
#include "check.h"
#include "nanochat_kernels.h"

int main(int, char** argv) {
    const nk_kernel* kernel = nullptr;
    CHECK_STATUS(nk_find("row_rstd", "bfloat16", "1280", "rstd", 0, 0, &kernel), NK_NO_DRIVER, argv[1]);
    for (const int architecture : {80, 90}) {  // the library may have been built for one of them
        if (kernel == nullptr) {
            nk_find("row_rstd", "bfloat16", "1280", "rstd", 0, architecture, &kernel);
        }
    }
    if (kernel == nullptr) {
        std::printf("no kernel row_rstd: %s\n", nk_last_error());
        return 77;  // skipped, to CTest
    }
    double width = 0;
    CHECK_STATUS(nk_constant(kernel, "WIDTH", &width), NK_OK, "");
    void* x = reinterpret_cast<void*>(0x10000);
    const nk_argument arguments[] = {nk_pointer(x, NK_BFLOAT16), nk_pointer(x, NK_FLOAT32), nk_integer(64), nk_integer(1280)};
    CHECK_STATUS(nk_launch(kernel, 1, 1, 1, nullptr, arguments, 4), NK_NO_DRIVER, argv[1]);
    CHECK_STATUS(nk_launch(kernel, 1, 1, 1, nullptr, arguments, 4), NK_NO_DRIVER, argv[1]);
    return finish();
}
