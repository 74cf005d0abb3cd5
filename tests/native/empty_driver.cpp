// A libcuda.so.1 that is too old to have any of the functions that the library needs.
extern "C" int cuDriverGetNothing() {
    return 0;
}
