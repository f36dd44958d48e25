// ort_runtime.h - ONNX Runtime itself: the library loaded at run time, and one environment for the process.
#pragma once

#include <memory>
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

  // Throws BACKEND with ONNX Runtime's text if status is not null.
  void check(Status* status, const char* action) const;
  // Loads an ONNX file, its weights mapped into memory rather than copied.
  [[nodiscard]] Session* load(const std::string& path) const;

 private:
  Runtime(const ApiBase& base, void* const* table, int32_t num_threads);

  Api api_;
  std::string version_;
  int32_t num_threads_;
  Env* env_ = nullptr;
};

// Owns an object of ONNX Runtime.
template <typename T>
using Owner = std::unique_ptr<T, void (*)(T*)>;

}  // namespace lococo::ort
