// A CUDA driver without a GPU, for tests: looks like an H100, runs nothing, and writes down what it is asked to do.
// Every answer can be set from the environment: FAKE_multiprocessors=66, FAKE_cuLaunchKernelEx=720 (a CUresult).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
enum { OK = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500, TOO_LARGE = 720 };

struct Function { char name[64]; int shared; };
struct Attribute { int id; char pad[4]; union { char bytes[64]; int number; } value; };
struct Config { unsigned grid[3], block[3], shared; void* stream; struct Attribute* attributes; unsigned count; };

static __thread int current;

static int setting(const char* name, int otherwise) {
    char whole[80] = "FAKE_";
    const char* text = getenv(strncat(whole, name, 70));
    return text ? atoi(text) : otherwise;
}
#define REFUSE_IF_SET if (setting(__func__, OK)) return setting(__func__, OK)
#define NEEDS_CONTEXT REFUSE_IF_SET; if (!current) return INVALID_CONTEXT
#define NOTE(...) do { FILE* log = fopen(getenv("FAKE_LOG"), "a"); fprintf(log, __VA_ARGS__); fclose(log); } while (0)

CUresult cuInit(unsigned flags) { REFUSE_IF_SET; return OK; }
CUresult cuDriverGetVersion(int* version) { *version = setting("version", 13000); return OK; }
CUresult cuDeviceGet(int* device, int index) { REFUSE_IF_SET; *device = index; return OK; }
CUresult cuDeviceGetName(char* name, int size, int device) {
    const char* text = getenv("FAKE_name");
    snprintf(name, size, "%s", text ? text : "NVIDIA H100 80GB HBM3");
    return OK;
}
CUresult cuDeviceGetAttribute(int* value, int which, int device) {  // numbers: enum CUdevice_attribute
    switch (which) {
        case 16: *value = setting("multiprocessors", 132); break;
        case 38: *value = 52428800; break;  // L2
        case 75: *value = setting("major", 9); break;
        case 76: *value = setting("minor", 0); break;
        case 95: *value = setting("cooperative", 1); break;
        case 97: *value = setting("shared", 232448); break;
        case 133: *value = setting("mps", 0); NOTE("asked for MPS\n"); break;
        default: return INVALID_VALUE;
    }
    return OK;
}
CUresult cuDevicePrimaryCtxRetain(void** context, int device) { REFUSE_IF_SET; *context = (void*)0x1000; return OK; }
CUresult cuCtxSetCurrent(void* context) { REFUSE_IF_SET; current = context != 0; return OK; }
CUresult cuModuleLoadData(void** module, const void* image) {
    NEEDS_CONTEXT;
    *module = (void*)0x2000;
    return memcmp(image, "\177ELF", 4) ? INVALID_IMAGE : OK;
}
CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
    NEEDS_CONTEXT;
    struct Function* f = calloc(1, sizeof *f);
    f->shared = 49152;
    strncpy(f->name, name, 63);
    *function = f;
    return OK;
}
CUresult cuFuncGetParamInfo(struct Function* f, size_t index, size_t* offset, size_t* size) {
    *offset = 0;
    *size = setting("arguments", 32);
    return index == 0 ? OK : INVALID_VALUE;
}
CUresult cuFuncGetAttribute(int* value, int which, struct Function* f) {
    *value = f->shared;
    return which == 8 ? OK : INVALID_VALUE;
}
CUresult cuFuncSetAttribute(struct Function* f, int which, int value) {
    REFUSE_IF_SET;
    NOTE("%s may have %d bytes\n", f->name, value);
    f->shared = value;
    return which == 8 ? OK : INVALID_VALUE;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, struct Function* f, int threads, size_t shared) {
    NEEDS_CONTEXT;
    *blocks = shared > (size_t)f->shared ? 0 : setting("each", 1);
    return OK;
}
CUresult cuLaunchKernelEx(const struct Config* c, struct Function* f, void** parameters, void** extra) {
    NEEDS_CONTEXT;
    if (c->shared > (unsigned)f->shared) return INVALID_VALUE;
    NOTE("%s grid %u,%u,%u block %u,%u,%u shared %u stream %p", f->name, c->grid[0], c->grid[1], c->grid[2], c->block[0],
         c->block[1], c->block[2], c->shared, c->stream);
    for (unsigned i = 0; i < c->count; i++) NOTE(" attribute %d=%d", c->attributes[i].id, c->attributes[i].value.number);
    NOTE(" arguments ");
    for (int i = 0; i < setting("arguments", 32); i++) NOTE("%02x", ((unsigned char*)parameters[0])[i]);
    NOTE("\n");
    return OK;
}
// NVRTC looks for a driver and for this, and does without.
CUresult cuGetExportTable(const void** table, const void* id) { *table = 0; return NOT_FOUND; }
CUresult cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* status) {
    static const struct { const char* name; void* function; } known[] = {
#define KNOWN(name) {#name, (void*)name}
        KNOWN(cuInit), KNOWN(cuDriverGetVersion), KNOWN(cuDeviceGet), KNOWN(cuDeviceGetName),
        KNOWN(cuDeviceGetAttribute), KNOWN(cuDevicePrimaryCtxRetain), KNOWN(cuCtxSetCurrent), KNOWN(cuModuleLoadData),
        KNOWN(cuModuleGetFunction), KNOWN(cuFuncGetParamInfo), KNOWN(cuFuncGetAttribute), KNOWN(cuFuncSetAttribute),
        KNOWN(cuOccupancyMaxActiveBlocksPerMultiprocessor), KNOWN(cuLaunchKernelEx),
        {"cuGetProcAddress", (void*)cuGetProcAddress_v2},
    };
    *function = 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) *function = known[i].function;
    if (status) *status = *function == 0;
    return *function ? OK : NOT_FOUND;
}
