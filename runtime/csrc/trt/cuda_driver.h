// cuda_driver.h - in liblococo: does a CUDA device answer? Asked of the driver alone, before TensorRT is touched.
#pragma once

#include <cstdint>
#include <string>

namespace lococo::trt {

struct CudaDevice {
  int32_t index = 0;
  std::string name;          // "NVIDIA H100 80GB HBM3"
  int32_t sm = 0;            // compute capability, 90 for 9.0
  int32_t cuda_version = 0;  // the newest CUDA that the driver runs, 13000 for 13.0

  [[nodiscard]] std::string text() const;
};

// "13.0" of 13000.
std::string cuda_version_text(int32_t version);

// UNSUPPORTED: no driver, a driver that fails, no device of that number.
CudaDevice query_cuda_device(int32_t index);

// UNSUPPORTED if the driver is older than what a module was built with.
void check_driver(const CudaDevice& device, int32_t cuda_version);

}  // namespace lococo::trt
