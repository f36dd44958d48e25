/* fake_libcuda.c - stands in for the NVIDIA driver in test_trt: one device of sm90, or what $FAKE_CUDA says. */
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
