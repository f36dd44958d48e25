/* fake_libcuda.c - stands in for the NVIDIA driver in tests: one device of sm90, or what $FAKE_CUDA says. Its memory is
 * the host's, and is there only in the device's context. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static int is(const char* what) {
  const char* value = getenv("FAKE_CUDA");
  return value != NULL && strcmp(value, what) == 0;
}

int cuInit(unsigned flags) {
  (void)flags;
  return is("no device") ? 100 : is("broken") ? 999 : 0;
}
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetName(char* name, int size, int device) {
  (void)device;
  strncpy(name, "Fake GPU", (size_t)size);
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  return *value = attribute == 75 ? 9 : 0, 0;
}
int cuDriverGetVersion(int* version) { return *version = is("old driver") ? 11040 : 12020, 0; }
int cuGetErrorName(int code, const char** text) { return (void)code, *text = "CUDA_ERROR_UNKNOWN", 0; }
int cuGetErrorString(int code, const char** text) { return (void)code, *text = "unknown error", 0; }

#define CONTEXT ((void*)0x30)
#define STREAM ((void*)2) /* the thread's own */
static void* contexts[8];
static int num_contexts;
static int ready(const void* stream) {
  if (num_contexts == 0 || contexts[num_contexts - 1] != CONTEXT) return 201; /* CUDA_ERROR_INVALID_CONTEXT */
  return is("dying") ? 700 : stream != STREAM ? 400 : 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { return (void)device, *context = CONTEXT, 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, 0; }
int cuCtxPushCurrent_v2(void* context) { return contexts[num_contexts++] = context, 0; }
int cuCtxPopCurrent_v2(void** context) { return *context = contexts[--num_contexts], 0; }
int cuCtxGetCurrent(void** context) { return *context = num_contexts > 0 ? contexts[num_contexts - 1] : NULL, 0; }
int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) { return *free_bytes = 1000, *total = 2000, ready(STREAM); }
int cuMemAlloc_v2(void** data, size_t nbytes) {
  const int code = is("no memory") ? 2 : ready(STREAM);
  if (code == 0) memset(*data = malloc(nbytes), 0xa5, nbytes);
  return code;
}
int cuMemFree_v2(void* data) { return free(data), 0; }
int cuMemsetD8Async(void* to, unsigned char value, size_t nbytes, void* stream) {
  return memset(to, value, nbytes), ready(stream);
}
int cuMemcpyAsync(void* to, const void* from, size_t nbytes, void* stream) {
  return memcpy(to, from, nbytes), ready(stream);
}
typedef struct { /* CUDA_MEMCPY2D: x in bytes, y, kind of memory, host, device, array, pitch, of both sides */
  size_t from_x, from_y;
  unsigned from_type;
  const void *from_host, *from_device, *from_array;
  size_t from_pitch, to_x, to_y;
  unsigned to_type;
  void *to_host, *to_device, *to_array;
  size_t to_pitch, width, height;
} copy_2d;
int cuMemcpy2DAsync_v2(const copy_2d* c, void* stream) {
  if (c->from_type != 2 || c->to_type != 2 || c->width == 0 || c->from_x + c->from_y + c->to_x + c->to_y != 0) return 1;
  if (c->from_pitch < c->width || c->to_pitch < c->width) return 1;
  for (size_t i = 0; i < c->height; ++i) {
    memcpy((char*)c->to_device + i * c->to_pitch, (const char*)c->from_device + i * c->from_pitch, c->width);
  }
  return ready(stream);
}
int cuStreamSynchronize(void* stream) { return ready(stream); }
