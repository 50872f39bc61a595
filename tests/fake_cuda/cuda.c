/* A libcuda.so.1 for machines without a GPU: one device whose memory is the host's and whose
 * kernels do nothing. It keeps what the host side can get wrong: which memory is CUDA's, what an
 * image is, whether it has a kernel of that name, what a tensor map may look like.
 *
 * FAKE_CUDA_INIT        what cuInit returns (0)
 * FAKE_CUDA_VERSION     of the driver (13000)
 * FAKE_CUDA_CAPABILITY  10 · major + minor (90)
 * FAKE_CUDA_COUNT       of devices (1)
 * FAKE_CUDA_BUSY        1: no event has happened yet
 * FAKE_CUDA_LOG         a file that gets a line for each image and launch; "order" lines are what
 * streams get: thread, what, and its stream last
 *
 * Compiled with -DWITHOUT_TENSOR_MAPS or -DWITHOUT_INIT it lacks a function. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int CUresult;
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500 };
#define EXPORT __attribute__((visibility("default")))

static int setting(const char *name, int fallback) {
    const char *text = getenv(name);
    return text != NULL ? atoi(text) : fallback;
}

static void note(const char *what, const char *name) {
    const char *path = getenv("FAKE_CUDA_LOG");
    FILE *file = path != NULL ? fopen(path, "a") : NULL;
    if (file != NULL) {
        fprintf(file, "%s %s\n", what, name);
        fclose(file);
    }
}

#ifndef WITHOUT_INIT
EXPORT CUresult cuInit(unsigned flags) {
    (void)flags;
    return setting("FAKE_CUDA_INIT", SUCCESS);
}
#endif

EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = setting("FAKE_CUDA_VERSION", 13000);
    return SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = error == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_FAKE";
    return SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == 100 ? "no CUDA-capable device is detected" : "of the fake driver";
    return SUCCESS;
}

/* --- the device and its context --- */

EXPORT CUresult cuDeviceGetCount(int *count) {
    *count = setting("FAKE_CUDA_COUNT", 1);
    return SUCCESS;
}

EXPORT CUresult cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char *name, int length, int device) {
    (void)device;
    snprintf(name, (size_t)length, "Fake");
    return SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    const int capability = setting("FAKE_CUDA_CAPABILITY", 90);
    (void)device;
    switch (attribute) {
    case 16: /* multiprocessors */
        *value = 132;
        break;
    case 75: /* compute capability, major */
        *value = capability / 10;
        break;
    case 76: /* minor */
        *value = capability % 10;
        break;
    case 97: /* shared memory of a block that opts in */
        *value = 232448;
        break;
    default:
        *value = 0;
    }
    return SUCCESS;
}

static int the_context;
static __thread void *current[16];
static __thread int depth;

EXPORT CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    *context = &the_context;
    return SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    return SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(void **context) {
    *context = current[depth];
    return SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(void *context) {
    current[depth] = context;
    return SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(void *context) {
    if (depth == 15)
        return INVALID_VALUE;
    current[++depth] = context;
    return SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(void **context) {
    if (depth == 0)
        return INVALID_VALUE;
    *context = current[depth--];
    return SUCCESS;
}

EXPORT CUresult cuCtxSynchronize(void) { return SUCCESS; }

EXPORT CUresult cuStreamSynchronize(void *stream) {
    (void)stream;
    return SUCCESS;
}

/* --- memory: blocks of the host's, in a list --- */

enum { MOST_BLOCKS = 1024 };
static struct {
    uintptr_t first, last;
} blocks[MOST_BLOCKS];
static int n_blocks;

EXPORT CUresult cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    void *data = NULL;
    const int own = __atomic_fetch_add(&n_blocks, 1, __ATOMIC_SEQ_CST);
    if (own >= MOST_BLOCKS || posix_memalign(&data, 512, bytes) != 0)
        return INVALID_VALUE;
    memset(data, 0, bytes);
    blocks[own].last = (uintptr_t)data + bytes;
    blocks[own].first = (uintptr_t)data;
    *address = (uintptr_t)data;
    return SUCCESS;
}

static int is_device(uint64_t address, size_t bytes) {
    for (int i = 0; i < n_blocks && i < MOST_BLOCKS; i++)
        if (address >= blocks[i].first && address + bytes <= blocks[i].last)
            return 1;
    return 0;
}

EXPORT CUresult cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
    if (attribute != 2 || !is_device(address, 1))
        return INVALID_VALUE;
    *(unsigned *)value = 2; /* of the device */
    return SUCCESS;
}

EXPORT CUresult cuMemsetD8Async(uint64_t target, unsigned char byte, size_t bytes, void *stream) {
    (void)stream;
    if (!is_device(target, bytes))
        return INVALID_VALUE;
    memset((void *)(uintptr_t)target, byte, bytes);
    return SUCCESS;
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t bytes, void *stream) {
    (void)stream;
    if (!is_device(source, bytes))
        return INVALID_VALUE;
    memcpy(target, (void *)(uintptr_t)source, bytes);
    return SUCCESS;
}

static void note_order(const char *what, const void *first, const void *second);

EXPORT CUresult cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, void *stream) {
    if (!is_device(source, bytes) || !is_device(target, bytes))
        return INVALID_VALUE;
    note_order("copy", NULL, stream);
    memcpy((void *)(uintptr_t)target, (void *)(uintptr_t)source, bytes);
    return SUCCESS;
}

struct side {
    size_t x, y;
    unsigned type;
    void *host;
    uint64_t device;
    void *array;
    size_t pitch;
};
struct copy {
    struct side source, target;
    size_t width, height;
};

EXPORT CUresult cuMemcpy2DAsync_v2(const struct copy *c, void *stream) {
    const struct side *from = &c->source, *to = &c->target;
    if (from->type != 2 || to->type != 2 || from->pitch < c->width || to->pitch < c->width ||
        !is_device(from->device, (c->height - 1) * from->pitch + c->width) ||
        !is_device(to->device, (c->height - 1) * to->pitch + c->width))
        return INVALID_VALUE;
    note_order("copy", NULL, stream);
    for (size_t row = 0; row < c->height; row++)
        memcpy((char *)(uintptr_t)to->device + row * to->pitch,
               (char *)(uintptr_t)from->device + row * from->pitch, c->width);
    return SUCCESS;
}

/* --- images and kernels --- */

struct module {
    unsigned char *image;
    size_t bytes;
};

/* The end of a 64-bit ELF file is the end of its section headers or of its program headers. */
static size_t elf_bytes(const unsigned char *image) {
    uint64_t programs, sections;
    uint16_t program_bytes, n_programs, section_bytes, n_sections;
    memcpy(&programs, image + 32, 8);
    memcpy(&sections, image + 40, 8);
    memcpy(&program_bytes, image + 54, 2);
    memcpy(&n_programs, image + 56, 2);
    memcpy(&section_bytes, image + 58, 2);
    memcpy(&n_sections, image + 60, 2);
    const size_t a = programs + (size_t)program_bytes * n_programs;
    const size_t b = sections + (size_t)section_bytes * n_sections;
    return a > b ? a : b;
}

EXPORT CUresult cuModuleLoadData(struct module **out, const void *image) {
    if (memcmp(image, "\177ELF", 4) != 0)
        return INVALID_IMAGE;
    struct module *module = malloc(sizeof *module);
    module->bytes = elf_bytes(image);
    module->image = malloc(module->bytes);
    memcpy(module->image, image, module->bytes);
    note("image", "loaded");
    *out = module;
    return SUCCESS;
}

EXPORT CUresult cuModuleUnload(struct module *module) {
    free(module->image);
    free(module);
    return SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(char **out, const struct module *module, const char *name) {
    const size_t length = strlen(name) + 1;
    for (size_t at = 0; at + length <= module->bytes; at++)
        if (memcmp(module->image + at, name, length) == 0) {
            *out = strdup(name);
            return SUCCESS;
        }
    return NOT_FOUND;
}

/* --- streams and events: what is enqueued is done at once; the log has the order --- */

static void note_order(const char *what, const void *first, const void *second) {
    char line[128];
    snprintf(line, sizeof line, "%d %s %p %p", (int)gettid(), what, first, second);
    note("order", line);
}

EXPORT CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}

EXPORT CUresult cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    if (flags != 1 || priority != -5)
        return INVALID_VALUE;
    *stream = malloc(1);
    return SUCCESS;
}

EXPORT CUresult cuStreamDestroy_v2(void *stream) {
    free(stream);
    return SUCCESS;
}

EXPORT CUresult cuEventCreate(void **event, unsigned flags) {
    if (flags != 2)
        return INVALID_VALUE;
    *event = malloc(1);
    return SUCCESS;
}

EXPORT CUresult cuEventDestroy_v2(void *event) {
    free(event);
    return SUCCESS;
}

EXPORT CUresult cuEventRecord(void *event, void *stream) {
    note_order("record", event, stream);
    return SUCCESS;
}

EXPORT CUresult cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    note_order("wait", event, stream);
    return flags == 0 ? SUCCESS : INVALID_VALUE;
}

EXPORT CUresult cuEventQuery(const void *event) {
    (void)event;
    return setting("FAKE_CUDA_BUSY", 0) ? 600 : SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(const char *function, int attribute, int value) {
    (void)function, (void)attribute;
    return value <= 232448 ? SUCCESS : INVALID_VALUE;
}

EXPORT CUresult cuLaunchKernel(const char *function, unsigned x, unsigned y, unsigned z,
                               unsigned block_x, unsigned block_y, unsigned block_z,
                               unsigned shared_bytes, void *stream, void **parameters,
                               void **extra) {
    (void)shared_bytes, (void)parameters, (void)extra;
    if (x == 0 || y == 0 || z == 0 || block_x * block_y * block_z > 1024)
        return INVALID_VALUE;
    note("launch", function);
    note_order(function, function, stream);
    return SUCCESS;
}

#ifndef WITHOUT_TENSOR_MAPS
EXPORT CUresult cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address,
                                       const uint64_t *dims, const uint64_t *strides,
                                       const uint32_t *box, const uint32_t *steps, int interleave,
                                       int swizzle, int promotion, int fill) {
    (void)type, (void)steps, (void)interleave, (void)swizzle, (void)promotion, (void)fill;
    if ((uintptr_t)address % 16 != 0 || !is_device((uintptr_t)address, 1))
        return INVALID_VALUE;
    for (uint32_t i = 0; i < rank; i++)
        if (dims[i] == 0 || box[i] == 0 || box[i] > 256 || (i > 0 && strides[i - 1] % 16 != 0))
            return INVALID_VALUE;
    memset(map, 0, 128);
    return SUCCESS;
}
#endif
