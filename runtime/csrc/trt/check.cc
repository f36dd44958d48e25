#include "trt/check.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>

#include "trt/kernels.h"

namespace lococo::trt {
namespace {

// Bytes that Linux can free at once, page cache included; 0 if it does not say.
uint64_t available_host_memory() {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    unsigned long long kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %llu", &kib) == 1) return kib * 1024;
  }
  return 0;
}

}  // namespace

void require_memory(uint64_t nbytes, const char* what) {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "ask for free memory");
  uint64_t available = free_bytes;
  int device = 0;
  int integrated = 0;
  check(cudaGetDevice(&device), "ask for the current device");
  check(cudaDeviceGetAttribute(&integrated, cudaDevAttrIntegrated, device), "ask for the kind of device");
  // A Jetson shares its memory with the CPU, whose page cache makes room when asked.
  if (integrated != 0) available = std::max(available, available_host_memory());
  if (nbytes <= available) return;
  fail(LOCOCO_ERROR_OUT_OF_MEMORY,
       "device memory: %s needs %llu bytes, %llu of %llu are free; close sessions and other programs on the GPU", what,
       static_cast<unsigned long long>(nbytes), static_cast<unsigned long long>(available),
       static_cast<unsigned long long>(total_bytes));
}

void require_kernels() {
  const cudaError_t code = find_kernels();
  if (code != cudaErrorNoKernelImageForDevice && code != cudaErrorInvalidDeviceFunction) {
    return check(code, "find the kernels");
  }
  (void)cudaGetLastError();
  int device = 0;
  int major = 0;
  int minor = 0;
  check(cudaGetDevice(&device), "ask for the current device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "ask for the kind of device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "ask for the kind of device");
  fail(LOCOCO_ERROR_UNSUPPORTED,
       "liblococo_trt: expected kernels for cuda:%d, which is sm%d%d, found those of other GPUs; compile it with cmake"
       " -DCMAKE_CUDA_ARCHITECTURES=%d%d",
       device, major, minor, major, minor);
}

DeviceMemory allocate_device(uint64_t nbytes, const char* what) {
  void* memory = nullptr;
  const std::string action = format("allocate %llu bytes for %s", static_cast<unsigned long long>(nbytes), what);
  check(cudaMalloc(&memory, std::max<uint64_t>(nbytes, 1)), action.c_str());
  return DeviceMemory(memory);
}

PinnedMemory allocate_pinned(uint64_t nbytes) {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, nbytes, cudaHostAllocDefault), "allocate pinned memory");
  return PinnedMemory(memory);
}

Stream create_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create a stream");
  return Stream(stream);
}

Event create_event(bool timed) {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming), "create an event");
  return Event(event);
}

double seconds_between(const Event& begin, const Event& end) {
  float milliseconds = 0.0f;
  check(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()), "read the device's clock");
  return milliseconds / 1e3;
}

}  // namespace lococo::trt
