#include "cuda_driver.h"

#include <dlfcn.h>

#include "error.h"

namespace lococo {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr int kNoDevice = 100;  // CUDA_ERROR_NO_DEVICE
// CUdevice_attribute, part of the driver's ABI
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;

}  // namespace

CudaDriver::CudaDriver()
    : library_(::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL)) {  // never closed: a driver does not come and go
  if (library_ == nullptr) {
    const char* reason = ::dlerror();
    fail(LOCOCO_ERROR_UNSUPPORTED,
         "device: expected an NVIDIA GPU with its driver, found no driver: %s; install the driver, start the"
         " container with --gpus all, or use device \"cpu\"",
         reason != nullptr ? reason : kLibrary);
  }
  const int code = function<int(unsigned)>("cuInit")(0);
  if (code == kNoDevice) {
    fail(LOCOCO_ERROR_UNSUPPORTED,
         "device: the NVIDIA driver sees no GPU; does CUDA_VISIBLE_DEVICES hide it, or was the container started"
         " without --gpus all?");
  }
  check(code, "cuInit");
}

void* CudaDriver::symbol(const char* name) const {
  void* symbol = ::dlsym(library_, name);
  if (symbol == nullptr) fail(LOCOCO_ERROR_UNSUPPORTED, "%s: expected %s in it; reinstall the driver", kLibrary, name);
  return symbol;
}

std::string CudaDriver::error_text(int code) const {
  const char* name = nullptr;
  const char* text = nullptr;
  function<int(int, const char**)>("cuGetErrorName")(code, &name);
  function<int(int, const char**)>("cuGetErrorString")(code, &text);
  return format("CUDA driver error %d, %s: %s", code, name != nullptr ? name : "unknown",
                text != nullptr ? text : "unknown error");
}

void CudaDriver::check(int code, const char* what) const {
  if (code == 0) return;
  fail(LOCOCO_ERROR_UNSUPPORTED, "device: %s: %s; does nvidia-smi work here?", what, error_text(code).c_str());
}

std::string cuda_version_text(int32_t version) { return format("%d.%d", version / 1000, version % 1000 / 10); }

std::string CudaDevice::text() const {
  return format("cuda:%d (%s, sm%d, driver for CUDA %s)", index, name.c_str(), sm,
                cuda_version_text(cuda_version).c_str());
}

CudaDevice query_cuda_device(int32_t index) {
  const CudaDriver driver;
  const auto integer = [&](const char* name, auto... args) {  // of a function whose first parameter is an int to fill
    int value = 0;
    driver.check(driver.function<int(int*, decltype(args)...)>(name)(&value, args...), name);
    return value;
  };
  const int count = integer("cuDeviceGetCount");
  if (index >= count) {
    fail(LOCOCO_ERROR_UNSUPPORTED, "device: expected cuda:0 to cuda:%d, got cuda:%d; the driver sees %d", count - 1,
         index, count);
  }
  const int handle = integer("cuDeviceGet", index);
  char name[256] = "";
  driver.check(driver.function<int(char*, int, int)>("cuDeviceGetName")(name, sizeof name - 1, handle),
               "cuDeviceGetName");
  CudaDevice device;
  device.index = index;
  device.name = name;
  device.sm = 10 * integer("cuDeviceGetAttribute", kCapabilityMajor, handle) +
              integer("cuDeviceGetAttribute", kCapabilityMinor, handle);
  device.cuda_version = integer("cuDriverGetVersion");
  return device;
}

void check_driver(const CudaDevice& device, int32_t cuda_version) {
  if (device.cuda_version / 1000 >= cuda_version / 1000) return;  // minor versions are compatible from CUDA 11 on
  fail(LOCOCO_ERROR_UNSUPPORTED,
       "driver: expected one for CUDA %d.0 or newer, which liblococo_trt was built with, found one for CUDA %s on"
       " cuda:%d; update the NVIDIA driver, or build liblococo_trt with an older CUDA toolkit",
       cuda_version / 1000, cuda_version_text(device.cuda_version).c_str(), device.index);
}

}  // namespace lococo
