// cuda_driver.h - in liblococo: the NVIDIA driver, loaded at run time. Does a CUDA device answer? Asked of the driver
// alone, before any library that needs one is touched.
#pragma once

#include <cstdint>
#include <string>

namespace lococo {

class CudaDriver {
 public:
  // UNSUPPORTED: no driver, no device, a driver that fails.
  CudaDriver();

  // A function of libcuda: the ones without a suffix, and of others the version that is named.
  template <typename F>
  [[nodiscard]] F* function(const char* name) const {
    return reinterpret_cast<F*>(symbol(name));
  }
  // "CUDA driver error 999, CUDA_ERROR_UNKNOWN: unknown error".
  [[nodiscard]] std::string error_text(int code) const;
  // UNSUPPORTED unless code is 0.
  void check(int code, const char* what) const;

 private:
  [[nodiscard]] void* symbol(const char* name) const;

  void* library_;
};

struct CudaDevice {
  int32_t index = 0;
  std::string name;          // "NVIDIA H100 80GB HBM3"
  int32_t sm = 0;            // compute capability, 90 for 9.0
  int32_t cuda_version = 0;  // the newest CUDA that the driver runs, 13000 for 13.0

  [[nodiscard]] std::string text() const;
};

// "13.0" of 13000.
std::string cuda_version_text(int32_t version);

// UNSUPPORTED: as CudaDriver, or no device of that number.
CudaDevice query_cuda_device(int32_t index);

// UNSUPPORTED if the driver is older than what a module was built with.
void check_driver(const CudaDevice& device, int32_t cuda_version);

}  // namespace lococo
