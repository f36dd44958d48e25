// check.h - in liblococo_trt: CUDA's return values as Errors, and owners of what CUDA hands out.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

#include "error.h"

namespace lococo::trt {

// Throws OUT_OF_MEMORY or BACKEND with CUDA's name of the error.
inline void check(cudaError_t code, const char* action) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();  // it is reported here, not a second time at the next launch
  fail(code == cudaErrorMemoryAllocation ? LOCOCO_ERROR_OUT_OF_MEMORY : LOCOCO_ERROR_BACKEND, "CUDA: cannot %s: %s: %s",
       action, cudaGetErrorName(code), cudaGetErrorString(code));
}

// Makes a device current for a scope; the caller's own device comes back.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device) {
    check(cudaGetDevice(&before_), "ask for the current device");
    check(cudaSetDevice(device), "select the device");
  }
  ~DeviceScope() { (void)cudaSetDevice(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

// A handle of CUDA that is freed with the object.
template <typename T, cudaError_t (*release)(T)>
class Handle {
 public:
  Handle() = default;
  explicit Handle(T value) : value_(value) {}
  Handle(Handle&& other) noexcept : value_(std::exchange(other.value_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~Handle() {
    if (value_ != nullptr) (void)release(value_);
  }
  [[nodiscard]] T get() const { return value_; }

 private:
  T value_ = nullptr;
};

using DeviceMemory = Handle<void*, cudaFree>;
using PinnedMemory = Handle<void*, cudaFreeHost>;
using Stream = Handle<cudaStream_t, cudaStreamDestroy>;
using Event = Handle<cudaEvent_t, cudaEventDestroy>;
using Graph = Handle<cudaGraph_t, cudaGraphDestroy>;
using GraphExec = Handle<cudaGraphExec_t, cudaGraphExecDestroy>;

// Throws OUT_OF_MEMORY, before anything is allocated, if the current device has less than nbytes left.
void require_memory(uint64_t nbytes, const char* what);

// Throws UNSUPPORTED if this library was not compiled for the current device.
void require_kernels();

DeviceMemory allocate_device(uint64_t nbytes, const char* what);
PinnedMemory allocate_pinned(uint64_t nbytes);
Stream create_stream();
Event create_event(bool timed = false);
double seconds_between(const Event& begin, const Event& end);  // timed ones that the device has passed

}  // namespace lococo::trt
