// Stands in for the CUDA driver, cuBLAS and cuRAND: memory of a device is memory of the process, copies are done, kernels and
// matrix products are counted and not run. A kernel that the loaded PTX does not have is an error, as it is with a GPU.
//
// Environment: NULL_DEVICES (1), NULL_CAPABILITY (80), NULL_MEMORY_MIB (24576, of one device).
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Results as in cuda.h.
enum { SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE = 100, INVALID_DEVICE, NOT_FOUND = 500 };
// CUdevice_attribute.
enum { MULTIPROCESSORS = 16, MAJOR = 75, MINOR, MEMORY_POOLS = 115 };

// Counts since the last call of `null_take`; main.rs has the same struct.
static struct Counts {
    size_t kernels, products, allocations, host_to_device, device_to_host, device_to_device, fills, syncs, events;
    size_t bytes, peak_bytes;
} counts;
static size_t release_threshold;

// One kernel, counted since the program began.
static struct Kernel {
    char name[128];
    size_t launches;
} kernels[1024];
static size_t known_kernels;

struct Counts null_take(void) {
    struct Counts taken = counts;
    counts = (struct Counts){.bytes = counts.bytes, .peak_bytes = counts.bytes};
    return taken;
}

size_t null_release_threshold(void) { return release_threshold; }

void null_print_kernels(void) {
    for (size_t i = 0; i < known_kernels; i++)
        if (kernels[i].launches) fprintf(stderr, "%8zu %s\n", kernels[i].launches, kernels[i].name);
}

static size_t setting(const char *name, size_t otherwise) {
    const char *value = getenv(name);
    return value ? strtoull(value, NULL, 10) : otherwise;
}

static size_t memory(void) { return setting("NULL_MEMORY_MIB", 24576) << 20; }

static int allocate(void **p, size_t n) {
    if (counts.bytes + n > memory()) return OUT_OF_MEMORY;
    // Zeros: a distribution that nobody computed is at least finite.
    if (!(*p = calloc(1, n ? n : 1))) return OUT_OF_MEMORY;
    counts.allocations++;
    counts.bytes += malloc_usable_size(*p);
    if (counts.bytes > counts.peak_bytes) counts.peak_bytes = counts.bytes;
    return SUCCESS;
}

static int release(void *p) {
    counts.bytes -= malloc_usable_size(p);
    free(p);
    return SUCCESS;
}

static int copy(void *to, const void *from, size_t n, size_t *count) {
    memcpy(to, from, n);
    ++*count;
    return SUCCESS;
}

static int handle(void **h) {
    *h = (void *)16;
    return SUCCESS;
}

// Devices.
int cuInit(unsigned flags) { return setting("NULL_DEVICES", 1) ? SUCCESS : NO_DEVICE; }
int cuDriverGetVersion(int *v) { return *v = 13000, SUCCESS; }
int cuDeviceGetCount(int *n) { return *n = (int)setting("NULL_DEVICES", 1), SUCCESS; }
int cuDeviceGet(int *device, int i) {
    *device = i;
    return i < (int)setting("NULL_DEVICES", 1) ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetName(char *name, int n, int device) { return snprintf(name, (size_t)n, "null driver"), SUCCESS; }
int cuDeviceTotalMem_v2(size_t *n, int device) { return *n = memory(), SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int capability = (int)setting("NULL_CAPABILITY", 80);
    switch (attribute) {
        case MULTIPROCESSORS: *value = 72; break;
        case MAJOR: *value = capability / 10; break;
        case MINOR: *value = capability % 10; break;
        case MEMORY_POOLS: *value = 1; break;
        default: *value = 0;
    }
    return SUCCESS;
}
int cuMemGetInfo_v2(size_t *left, size_t *total) {
    *total = memory();
    *left = *total - counts.bytes;
    return SUCCESS;
}
int cuGetErrorName(int error, const char **name) { return *name = "an error's name", SUCCESS; }
int cuGetErrorString(int error, const char **text) { return *text = "from the null driver", SUCCESS; }

// Contexts, streams, events.
int cuDevicePrimaryCtxRetain(void **context, int device) { return handle(context); }
int cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
int cuCtxGetCurrent(void **context) { return handle(context); }
int cuCtxSetCurrent(void *context) { return SUCCESS; }
int cuCtxGetDevice(int *device) { return *device = 0, SUCCESS; }
int cuCtxSynchronize(void) { return counts.syncs++, SUCCESS; }
int cuStreamCreate(void **stream, unsigned flags) { return handle(stream); }
int cuStreamDestroy_v2(void *stream) { return SUCCESS; }
int cuStreamSynchronize(void *stream) { return counts.syncs++, SUCCESS; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0, SUCCESS; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return SUCCESS; }
int cuEventCreate(void **event, unsigned flags) { return counts.events++, handle(event); }
int cuEventRecord(void *event, void *stream) { return SUCCESS; }
int cuEventSynchronize(void *event) { return SUCCESS; }
int cuEventDestroy_v2(void *event) { return SUCCESS; }

// Memory.
int cuDeviceGetDefaultMemPool(void **pool, int device) { return handle(pool); }
int cuMemPoolSetAttribute(void *pool, int attribute, void *value) {
    return memcpy(&release_threshold, value, sizeof release_threshold), SUCCESS;
}
int cuMemAllocAsync(void **p, size_t n, void *stream) { return allocate(p, n); }
int cuMemAlloc_v2(void **p, size_t n) { return allocate(p, n); }
int cuMemFreeAsync(void *p, void *stream) { return release(p); }
int cuMemFree_v2(void *p) { return release(p); }
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t n, void *stream) {
    return copy(to, from, n, &counts.host_to_device);
}
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t n, void *stream) {
    return copy(to, from, n, &counts.device_to_host);
}
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t n, void *stream) {
    return copy(to, from, n, &counts.device_to_device);
}
int cuMemsetD8Async(void *p, unsigned char value, size_t n, void *stream) {
    memset(p, value, n);
    counts.fills++;
    return SUCCESS;
}

// Kernels: a module is the text of its PTX.
int cuModuleLoadData(void **module, const void *ptx) { return *module = strdup(ptx), SUCCESS; }
int cuModuleUnload(void *module) { return free(module), SUCCESS; }
int cuModuleGetFunction(struct Kernel **kernel, const char *module, const char *name) {
    char entry[200];
    snprintf(entry, sizeof entry, ".entry %s(", name);
    if (!strstr(module, entry)) {
        fprintf(stderr, "null driver: there is no kernel %s\n", name);
        return NOT_FOUND;
    }
    *kernel = kernels;
    while (*kernel < kernels + known_kernels && strcmp((*kernel)->name, name)) ++*kernel;
    if (*kernel == kernels + known_kernels) {
        snprintf((*kernel)->name, sizeof(*kernel)->name, "%s", name);
        known_kernels++;
    }
    return SUCCESS;
}
int cuLaunchKernel(struct Kernel *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    // The limits of every device since compute capability 3.0.
    if (!gx || !gy || !gz || gx > 2147483647u || gy > 65535 || gz > 65535 || !bx || !by || !bz || bx * by * bz > 1024) {
        fprintf(stderr, "null driver: %s launched over %u x %u x %u blocks of %u x %u x %u threads\n", kernel->name, gx, gy, gz,
                bx, by, bz);
        return INVALID_VALUE;
    }
    kernel->launches++;
    counts.kernels++;
    return SUCCESS;
}

// Libraries.
int cublasCreate_v2(void **h) { return handle(h); }
int cublasDestroy_v2(void *h) { return SUCCESS; }
int cublasSetStream_v2(void *h, void *stream) { return SUCCESS; }
int cublasGetProperty(int part, int *value) { return *value = part ? 0 : 13, SUCCESS; }
int cublasGemmEx(void) { return counts.products++, SUCCESS; }
int cublasGemmStridedBatchedEx(void) { return counts.products++, SUCCESS; }
int curandCreateGenerator(void **h, int kind) { return handle(h); }
int curandDestroyGenerator(void *h) { return SUCCESS; }
int curandSetPseudoRandomGeneratorSeed(void *h, unsigned long long seed) { return SUCCESS; }
int curandSetStream(void *h, void *stream) { return SUCCESS; }
