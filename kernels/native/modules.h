// The code of variants in the contexts that launched them.
#pragma once

#include "driver.h"
#include "table.h"

namespace nanochat {

// What a launch needs to know of the context that is current in this thread.
struct Context {
    unsigned long long id;  // never reused, unlike the address of a context
    CUdevice device;
};

// Throws a Failure if no context is current.
Context current_context(const Driver& driver);

// Returns the compute capability of a device, such as 80.
int compute_capability(const Driver& driver, CUdevice device);

// Returns the function of a variant in the current context; loads it at the first call. Throws a Failure.
CUfunction function_of(const Driver& driver, const Context& context, const nk_kernel& kernel, const Variant& variant);

}  // namespace nanochat
