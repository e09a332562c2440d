/* A stand-in for the CUDA driver, runtime and cuBLAS on one pretended GPU (compute capability 9.0, 8 GiB), for
 * scripts/cuda_session_proof.py: loaded by LD_PRELOAD before onnxruntime's CUDA provider, with the driver's file name.
 *
 * Device memory is the host's, so copies are real: every one is counted by where its two ends lie, whatever the caller
 * calls it, and has to stay inside an allocation. Fresh memory holds NaN, as what was not written must show. Kernels and
 * products of matrices compute nothing: they are counted, kernels by name.
 */

#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef int status; /* cudaError_t, cublasStatus_t, CUresult: 0 is success in each */
typedef struct { unsigned x, y, z; } dim3;
enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2 };

/* ---- what is counted; the order of `Counts` in cuda_session_proof.py ---------------------------------------------- */

struct counts {
    long host_to_device, device_to_host, device_to_device; /* bytes */
    long copies;                                           /* of any kind */
    long set_bytes;                                        /* by cudaMemset */
    long outside;                                          /* copies that leave an allocation, or contradict their kind */
    long kernels, products;                                /* launched; calls of cuBLAS for a product */
    long tf32;                                             /* times that cuBLAS was told to round to TF32 */
    long allocations, allocated_bytes, frees;              /* device memory */
    long pinned_allocations, pinned_frees;                 /* host memory */
    long synchronisations;                                 /* of the host with the device */
};
static struct counts now;

struct counts stand_in_counts(void) { return now; }

long stand_in_memory = (long)8 << 30; /* bytes of the GPU */

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static struct { char *start; size_t size; } blocks[1 << 16];
static int block_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Whether an address is the device's; if so, `*left` is how many bytes of its allocation begin there. */
static int on_device(const void *address, size_t *left) {
    for (int i = 0; i < block_count; i++) {
        size_t offset = (size_t)((const char *)address - blocks[i].start);
        if ((const char *)address >= blocks[i].start && offset < blocks[i].size) {
            *left = blocks[i].size - offset;
            return 1;
        }
    }
    return 0;
}

/* Counts a copy of `size` bytes in all, whose ends reach `source_span` and `target_span` bytes; kind: cudaMemcpyKind. */
static void count_copy(const void *target, size_t target_span, const void *source, size_t source_span, size_t size, int kind) {
    size_t target_left = target_span, source_left = source_span;
    int to_device = on_device(target, &target_left), from_device = on_device(source, &source_left);
    if (target_left < target_span || source_left < source_span) now.outside++;
    if (kind != 4 && kind != (from_device ? 2 + to_device : to_device)) now.outside++; /* 4: found from the addresses */
    if (to_device && from_device) now.device_to_device += size;
    else if (to_device) now.host_to_device += size;
    else if (from_device) now.device_to_host += size;
    now.copies++;
}

static status allocate(void **address, size_t size) {
    pthread_mutex_lock(&lock);
    size_t used = 0;
    for (int i = 0; i < block_count; i++) used += blocks[i].size;
    int fits = used + size <= (size_t)stand_in_memory && block_count < (int)(sizeof blocks / sizeof *blocks);
    *address = fits ? malloc(size ? size : 1) : NULL;
    if (*address) {
        memset(*address, 0xFF, size);
        blocks[block_count].start = *address, blocks[block_count++].size = size;
        now.allocations++, now.allocated_bytes += size;
    }
    pthread_mutex_unlock(&lock);
    return *address ? 0 : OUT_OF_MEMORY;
}

static status release(void *address) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < block_count && blocks[i].start != address) i++;
    int known = i < block_count;
    if (known) {
        blocks[i] = blocks[--block_count];
        free(address);
        now.frees++;
    }
    pthread_mutex_unlock(&lock);
    return known || !address ? 0 : INVALID_VALUE;
}

static status pin(void **address, size_t size) {
    *address = malloc(size ? size : 1);
    now.pinned_allocations++;
    return *address ? 0 : OUT_OF_MEMORY;
}

static status copy(void *target, const void *source, size_t size, int kind) {
    pthread_mutex_lock(&lock);
    count_copy(target, size, source, size, size, kind);
    memmove(target, source, size);
    pthread_mutex_unlock(&lock);
    return 0;
}

static status set(void *target, int value, size_t size) {
    now.set_bytes += size;
    memset(target, value, size);
    return 0;
}

status cudaMalloc(void **address, size_t size) { return allocate(address, size); }
status cudaMallocAsync(void **address, size_t size, void *stream) { return allocate(address, size); }
status cudaFree(void *address) { return release(address); }
status cudaFreeAsync(void *address, void *stream) { return release(address); }
status cudaMallocHost(void **address, size_t size) { return pin(address, size); }
status cudaHostAlloc(void **address, size_t size, unsigned flags) { return pin(address, size); }
status cudaFreeHost(void *address) { free(address); now.pinned_frees++; return 0; }
status cudaMemcpy(void *target, const void *source, size_t size, int kind) { now.synchronisations++; return copy(target, source, size, kind); }
status cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *stream) { return copy(target, source, size, kind); }
status cudaMemset(void *target, int value, size_t size) { return set(target, value, size); }
status cudaMemsetAsync(void *target, int value, size_t size, void *stream) { return set(target, value, size); }
status cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = (size_t)stand_in_memory; return 0; }

status cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width, size_t height, int kind, void *stream) {
    size_t last = height ? height - 1 : 0;
    pthread_mutex_lock(&lock);
    count_copy(target, last * target_pitch + width, source, last * source_pitch + width, width * height, kind);
    for (size_t row = 0; row < height; row++)
        memmove((char *)target + row * target_pitch, (const char *)source + row * source_pitch, width);
    pthread_mutex_unlock(&lock);
    return 0;
}

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

static struct { const void *function; const char *name; long launches; } *kernels;
static int kernel_count, kernel_room;

/* Called by the provider's library for each of its kernels, when it is loaded. */
void __cudaRegisterFunction(void **fat_binary, const char *function, char *device_function, const char *name, ...) {
    if (kernel_count == kernel_room) kernels = realloc(kernels, (kernel_room = kernel_room * 2 + 1024) * sizeof *kernels);
    kernels[kernel_count].function = function, kernels[kernel_count].name = name, kernels[kernel_count++].launches = 0;
}

static status launch(const void *function) {
    now.kernels++;
    for (int i = 0; i < kernel_count; i++)
        if (kernels[i].function == function) {
            kernels[i].launches++;
            break;
        }
    return 0;
}

/* The name of the i-th kernel and how often it was launched; NULL behind the last one. */
const char *stand_in_kernel(int i, long *launches) {
    if (i >= kernel_count) return NULL;
    *launches = kernels[i].launches;
    return kernels[i].name;
}

status cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) { return launch(function); }
status cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) { return launch(function); }
status cudaLaunchKernelExC(const void *config, const void *function, void **arguments) { return launch(function); }
status __cudaGetKernel(const void **kernel, const void *function) { *kernel = function; return 0; }
status __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) { return launch(kernel); }
status cudaFuncSetAttribute(const void *function, int attribute, int value) { return 0; }
status cudaFuncGetAttributes(void *attributes, const void *function) { memset(attributes, 0, 64); return 0; }
status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared, unsigned flags) { *blocks = 2; return 0; }

/* ---- the device, streams, events --------------------------------------------------------------------------------- */

struct properties { /* the beginning of cudaDeviceProp in CUDA 13 */
    char name[256], ids[32];
    size_t total_memory, shared_memory_per_block;
    int registers_per_block, warp_size;
    size_t pitch;
    int threads_per_block, block_size[3], grid_size[3];
    size_t constant_memory;
    int major, minor;
    size_t texture_alignment[2];
    int multiprocessors;
};

status cudaGetDeviceProperties(struct properties *found, int device) {
    memset(found, 0, 1000);
    *found = (struct properties){
        .name = "stand-in", .total_memory = (size_t)stand_in_memory, .shared_memory_per_block = 48 << 10, .registers_per_block = 64 << 10,
        .warp_size = 32, .threads_per_block = 1024, .block_size = {1024, 1024, 64}, .grid_size = {0x7FFFFFFF, 65535, 65535},
        .major = 9, .minor = 0, .multiprocessors = 132,
    };
    return 0;
}

status cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1024; /* compute capability, major and minor */
    return 0;
}

status cudaGetDeviceCount(int *count) { *count = 1; return 0; }
status cudaGetDevice(int *device) { *device = 0; return 0; }
status cudaSetDevice(int device) { return 0; }
status cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
status cudaGetLastError(void) { return 0; }
status cudaPeekAtLastError(void) { return 0; }
status cudaDeviceSynchronize(void) { now.synchronisations++; return 0; }
status cudaStreamSynchronize(void *stream) { now.synchronisations++; return 0; }
status cudaEventSynchronize(void *event) { now.synchronisations++; return 0; }
status cudaStreamCreate(void **stream) { *stream = (void *)1; return 0; }
status cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = (void *)1; return 0; }
status cudaStreamDestroy(void *stream) { return 0; }
status cudaStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
status cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
status cudaEventCreate(void **event) { *event = (void *)1; return 0; }
status cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)1; return 0; }
status cudaEventDestroy(void *event) { return 0; }
status cudaEventRecord(void *event, void *stream) { return 0; }
status cuTensorMapEncodeTiled(void) { return 0; } /* all that the provider asks of the driver itself */

/* ---- cuBLAS ------------------------------------------------------------------------------------------------------ */

status cublasCreate_v2(void **handle) { *handle = (void *)1; return 0; }
status cublasLtCreate(void **handle) { *handle = (void *)1; return 0; }
status cublasDestroy_v2(void *handle) { return 0; }
status cublasLtDestroy(void *handle) { return 0; }
status cublasSetStream_v2(void *handle, void *stream) { return 0; }
status cublasSetMathMode(void *handle, int mode) { now.tf32 += mode == 3; return 0; } /* CUBLAS_TF32_TENSOR_OP_MATH */
status cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
status cublasSetWorkspace_v2(void *handle, void *workspace, size_t size) { return 0; }

/* `compute`: a cublasComputeType_t; 77 is CUBLAS_COMPUTE_32F_FAST_TF32. */
static status product(int compute) { now.products++, now.tf32 += compute == 77; return 0; }
#define ANY const void *
status cublasSgemm_v2(void) { return product(0); }
status cublasSgemmBatched(void) { return product(0); }
status cublasSgemmStridedBatched(void) { return product(0); }
status cublasLtMatmul(void) { return product(0); }
status cublasGemmEx(ANY handle, int ta, int tb, int m, int n, int k, ANY alpha, ANY a, int at, int lda, ANY b, int bt, int ldb, ANY beta, ANY c, int ct, int ldc, int compute, int algorithm) { return product(compute); }
status cublasGemmBatchedEx(ANY handle, int ta, int tb, int m, int n, int k, ANY alpha, ANY a, int at, int lda, ANY b, int bt, int ldb, ANY beta, ANY c, int ct, int ldc, int count, int compute, int algorithm) { return product(compute); }
status cublasGemmStridedBatchedEx(ANY handle, int ta, int tb, int m, int n, int k, ANY alpha, ANY a, int at, int lda, long long as, ANY b, int bt, int ldb, long long bs, ANY beta, ANY c, int ct, int ldc, long long cs, int count, int compute, int algorithm) { return product(compute); }
