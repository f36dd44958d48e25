// ort_runtime.h - ONNX Runtime itself: the library loaded at run time, and one environment for the process.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "backend.h"
#include "ort_api.h"

namespace lococo::ort {

class Runtime {
 public:
  // Loads the library and makes its environment on the first call; later calls get the same one, and are refused
  // (INVALID_ARGUMENT) if they ask for another library or number of threads. NOT_FOUND, UNSUPPORTED, BACKEND.
  static const Runtime& get(const BackendOptions& options);

  [[nodiscard]] const Api& api() const { return api_; }
  [[nodiscard]] const std::string& version() const { return version_; }

  // Throws with ONNX Runtime's text if status is not null: BACKEND, UNSUPPORTED, OUT_OF_MEMORY, NOT_FOUND (cuDNN).
  void check(Status* status, const char* action) const;
  // UNSUPPORTED unless this is a build with the CUDA provider.
  [[nodiscard]] const CudaApi& cuda_api() const;
  // Loads an ONNX file, its weights mapped into memory rather than copied; with a CUDA device copied there, and every
  // node runs there (NOT_FOUND: a library that it needs; UNSUPPORTED: no CUDA provider, a node cannot).
  [[nodiscard]] Session* load(const std::string& path, std::optional<int32_t> cuda_device) const;

 private:
  Runtime(const ApiBase& base, void* const* table, std::string path, int32_t num_threads);
  void append_cuda(SessionOptions* options, int32_t device) const;

  Api api_;
  std::optional<CudaApi> cuda_api_;
  std::string version_;
  std::string path_;
  int32_t num_threads_;
  Env* env_ = nullptr;
};

// Owns an object of ONNX Runtime.
template <typename T>
using Owner = std::unique_ptr<T, void (*)(T*)>;

}  // namespace lococo::ort
