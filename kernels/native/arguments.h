// The arguments of a launch: which variant takes them, and the form in which the driver wants them.
#pragma once

#include "driver.h"
#include "table.h"

namespace nanochat {

// Returns the nk_kind of the argument for a parameter.
int32_t kind_of(const Parameter& parameter);

// Returns the first variant whose requirements the arguments fulfil. Throws a Failure that says what is wrong with an argument.
const Variant& choose(const nk_kernel& kernel, const nk_argument* arguments, size_t count);

// Arguments of a variant, copied to where the driver can read them.
class Packed {
public:
    Packed(const Driver& driver, const Variant& variant, const nk_argument* arguments);
    Packed(const Packed&) = delete;
    Packed& operator=(const Packed&) = delete;
    void** parameters() { return pointers_; }

private:
    void add_word(const void* value, size_t bytes);
    void add_matrix(const Driver& driver, const Parameter& parameter, const nk_matrix& matrix);

    // more than any kernel has: 5 words a matrix, 1 for every other argument
    static constexpr size_t kWords = 128, kMaps = 8;
    CUtensorMap maps_[kMaps];
    uint64_t words_[kWords];
    void* pointers_[kWords + kMaps];
    size_t map_count_ = 0, word_count_ = 0, count_ = 0;
};

}  // namespace nanochat
