/* The Triton kernels of nanochat, compiled ahead of time for NVIDIA GPUs.
 *
 * The library needs no CUDA toolkit: it loads the driver when a function needs it. It launches in the CUDA context that is
 * current in the calling thread, which cudaSetDevice or cuCtxSetCurrent sets. All functions may be called from several threads
 * at once. They return a status and never end the process; nk_last_error says in words what went wrong.
 *
 *   const nk_kernel* kernel;
 *   nk_find("row_rstd", "bfloat16", "1280", "rstd", 0, 0, &kernel);
 *   nk_argument arguments[] = {nk_pointer(x, NK_BFLOAT16), nk_pointer(rstd, NK_FLOAT32), nk_integer(rows), nk_integer(1280)};
 *   nk_launch(kernel, grid, 1, 1, stream, arguments, 4);
 *
 * share/nanochat_kernels/manifest.json of an installation lists all launches with their arguments, constants, registers and
 * grids.
 */
#ifndef NANOCHAT_KERNELS_H
#define NANOCHAT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NK_VERSION 1
#define NK_API __attribute__((visibility("default")))

typedef enum nk_status {
    NK_OK = 0,
    NK_BAD_ARGUMENT = 1,     /* an argument of the function or of the kernel is not what is wanted */
    NK_UNKNOWN_KERNEL = 2,   /* the library has no kernel of this name, dtype, shape, flags and architecture */
    NK_NO_DRIVER = 3,        /* libcuda.so.1 cannot be loaded, or is too old */
    NK_NO_DEVICE = 4,        /* the driver finds no GPU that it can use */
    NK_NO_CONTEXT = 5,       /* no CUDA context is current in this thread */
    NK_NO_CODE = 6,          /* the kernel has neither a cubin nor PTX that the GPU can run */
    NK_OUT_OF_RESOURCES = 7, /* the kernel needs more shared memory than the GPU has, or host memory ran out */
    NK_DRIVER_ERROR = 8      /* the driver reports another error */
} nk_status;

typedef enum nk_dtype {
    NK_NO_DTYPE = 0,
    NK_BFLOAT16 = 1,
    NK_FLOAT16 = 2,
    NK_FLOAT32 = 3,
    NK_FLOAT64 = 4,
    NK_BOOL = 5,
    NK_UINT8 = 6,
    NK_INT8 = 7,
    NK_INT16 = 8,
    NK_INT32 = 9,
    NK_INT64 = 10
} nk_dtype;

typedef enum nk_kind { NK_NONE = 0, NK_POINTER = 1, NK_INTEGER = 2, NK_NUMBER = 3, NK_MATRIX = 4 } nk_kind;

/* A matrix on the device for kernels of sm_90, which read it through a descriptor: data at a multiple of 16 bytes; shape and
 * strides in elements, the last stride 1, the others multiples of 16 bytes. */
typedef struct nk_matrix {
    void* data;
    int32_t dtype; /* nk_dtype */
    int32_t rank;  /* 1 to 5 */
    int64_t shape[5];
    int64_t strides[5];
} nk_matrix;

/* An argument of a kernel. dtype is that of what a pointer points to. A kernel's optional argument is NK_NONE where it is left
 * out, and a pointer that its constants say is not used may be null, of any dtype. */
typedef struct nk_argument {
    int32_t kind;  /* nk_kind */
    int32_t dtype; /* nk_dtype */
    union {
        void* pointer;
        int64_t integer;
        double number;
        const nk_matrix* matrix;
    } value;
} nk_argument;

static inline nk_argument nk_none(void) {
    nk_argument argument = {NK_NONE, NK_NO_DTYPE, {0}};
    return argument;
}

static inline nk_argument nk_pointer(void* pointer, nk_dtype dtype) {
    nk_argument argument = {NK_POINTER, (int32_t)dtype, {0}};
    argument.value.pointer = pointer;
    return argument;
}

static inline nk_argument nk_integer(int64_t integer) {
    nk_argument argument = {NK_INTEGER, NK_NO_DTYPE, {0}};
    argument.value.integer = integer;
    return argument;
}

static inline nk_argument nk_number(double number) {
    nk_argument argument = {NK_NUMBER, NK_NO_DTYPE, {0}};
    argument.value.number = number;
    return argument;
}

static inline nk_argument nk_matrix_argument(const nk_matrix* matrix) {
    nk_argument argument = {NK_MATRIX, NK_NO_DTYPE, {0}};
    argument.value.matrix = matrix;
    return argument;
}

/* A Triton kernel with its constants, such as block sizes. It lives as long as the library. */
typedef struct nk_kernel nk_kernel;

/* A launch that some call of an operation makes, and the kernel that serves it. */
typedef struct nk_entry {
    const char* kernel; /* its name in the launch tables, kernels/configs/sm*.json */
    const char* dtype;  /* as in "bfloat16" */
    const char* shape;  /* the shape class in the launch tables, as in "1280" */
    const char* flags;  /* the use, by the names that `nanochat kernels inspect` prints */
    int launch;         /* a use may launch several kernels, one after the other */
    int architecture;   /* 80 or 90: whose launch table the constants come from */
    const nk_kernel* found;
} nk_entry;

typedef struct nk_parameter {
    const char* name;
    int32_t kind;     /* nk_kind of the argument */
    int32_t dtype;    /* nk_dtype of a pointer or matrix */
    int32_t multiple; /* the integer, or the address in bytes, is a multiple of this */
    int32_t value;    /* the only value that the integer may have, or 0 for any */
} nk_parameter;

/* NK_VERSION of the library that is loaded. */
NK_API int nk_version(void);

/* The name of a status, such as "NK_NO_DRIVER"; never null. */
NK_API const char* nk_status_name(nk_status status);

/* What went wrong in the last call of this thread that failed, one sentence; valid until the thread's next call that fails. */
NK_API const char* nk_last_error(void);

/* Stores all entries of the library and their number. */
NK_API nk_status nk_entries(const nk_entry** entries, size_t* count);

/* Stores the kernel of an entry. architecture: 80 or 90, or 0 for the one whose code suits the GPU of the current context. */
NK_API nk_status nk_find(const char* kernel, const char* dtype, const char* shape, const char* flags, int launch,
                         int architecture, const nk_kernel** found);

/* Stores the kernel with an id of manifest.json. */
NK_API nk_status nk_find_id(const char* id, int architecture, const nk_kernel** found);

/* Stores the value of a constant or option of a kernel, such as ROWS; the caller computes the grid with it. */
NK_API nk_status nk_constant(const nk_kernel* kernel, const char* name, double* value);

/* Stores the name of the Triton function and the number of variants of a kernel. Variants differ in what they require of
 * the arguments; the first ones require most. */
NK_API nk_status nk_describe(const nk_kernel* kernel, const char** function, size_t* variants);

/* Stores the parameters of a variant, at most `capacity`, and how many it has. */
NK_API nk_status nk_parameters(const nk_kernel* kernel, size_t variant, nk_parameter* parameters, size_t capacity,
                               size_t* count);

/* Launches the first variant whose requirements the arguments fulfil, on a CUstream or cudaStream_t of the current context. Its
 * code is loaded at its first launch in a context. Does not wait for the GPU. Costs no memory on the device but the code. */
NK_API nk_status nk_launch(const nk_kernel* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, void* stream,
                           const nk_argument* arguments, size_t count);

#ifdef __cplusplus
}
#endif

#endif
