// What the tests check with: a failed check prints its line, and the program ends with status 1 after the others.
#pragma once

#include <cstdio>
#include <string>

inline int failed_checks = 0;

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            ++failed_checks;                                                               \
            std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
        }                                                                                  \
    } while (0)

// Checks the status of a call, and that the message of a failure contains some words.
#define CHECK_STATUS(call, wanted, words)                                                                   \
    do {                                                                                                    \
        const nk_status status_ = (call);                                                                   \
        const std::string text_ = status_ == NK_OK ? "" : nk_last_error();                                  \
        if (status_ != (wanted) || text_.find(words) == std::string::npos) {                                \
            ++failed_checks;                                                                                \
            std::fprintf(stderr, "%s:%d: %s returned %s (%s), wanted %s (%s)\n", __FILE__, __LINE__, #call, \
                         nk_status_name(status_), text_.c_str(), nk_status_name(wanted), words);            \
        }                                                                                                   \
    } while (0)

inline int finish() {
    if (failed_checks == 0) {
        std::puts("all checks passed");
    }
    return failed_checks == 0 ? 0 : 1;
}
