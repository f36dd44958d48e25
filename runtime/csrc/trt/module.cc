// The C boundary of liblococo_trt: exceptions become statuses, and the device is current inside. Nothing else.
#include "module.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <new>

#include "error.h"
#include "trt/executor.h"
#include "trt/nvinfer.h"

#if CUDART_VERSION < 12000
#error "CUDA 12 or newer is needed"
#endif

struct lococo_module_backend {
  explicit lococo_module_backend(const lococo_module_bundle& bundle) : impl(bundle) {}
  lococo::trt::Backend impl;
};

struct lococo_module_executor {
  explicit lococo_module_executor(lococo::trt::Backend& backend) : impl(backend) {}
  lococo::trt::Executor impl;
};

namespace {

using lococo::trt::DeviceScope;

std::atomic<const lococo_module_host*> the_host{nullptr};

// The only place where exceptions end.
template <typename F>
lococo_status guarded(lococo_module_error* error, F&& body) noexcept {
  const auto report = [error](lococo_status status, const char* text) {
    std::snprintf(error->text, sizeof error->text, "%s", text);
    return status;
  };
  try {
    body();
    return LOCOCO_OK;
  } catch (const lococo::Error& e) {
    return report(e.status(), e.what());
  } catch (const std::bad_alloc&) {
    return report(LOCOCO_ERROR_OUT_OF_MEMORY, "out of host memory");
  } catch (const std::exception& e) {
    return report(LOCOCO_ERROR_INTERNAL, e.what());
  } catch (...) {
    return report(LOCOCO_ERROR_INTERNAL, "an exception of unknown type");
  }
}

template <typename F>
lococo_status with_executor(lococo_module_executor* executor, lococo_module_error* error, F&& body) noexcept {
  return guarded(error, [&] {
    const DeviceScope scope(executor->impl.device());
    body(executor->impl);
  });
}

template <typename T>
void destroy(T* object) noexcept {
  if (object == nullptr) return;
  lococo_module_error error;
  const lococo_status status = guarded(&error, [&] {
    const DeviceScope scope(object->impl.device());
    delete object;
  });
  if (status != LOCOCO_OK) lococo::log_line(LOCOCO_LOG_ERROR, error.text);  // it leaks: the device is gone
}

using lococo::trt::Executor;

const lococo_module kModule = {
    /*abi=*/LOCOCO_MODULE_ABI,
    /*backend=*/"tensorrt",
    /*cuda_version=*/CUDART_VERSION,
    /*load=*/
    [](const lococo_module_host* host, const char** version, lococo_module_error* error) {
      return guarded(error, [&] {
        the_host = host;
        *version = lococo::trt::load_tensorrt(host);
      });
    },
    /*open=*/
    [](const lococo_module_bundle* bundle, lococo_module_backend** out, lococo_module_error* error) {
      return guarded(error, [&] {
        const DeviceScope scope(bundle->device);
        *out = new lococo_module_backend(*bundle);
      });
    },
    /*close=*/[](lococo_module_backend* backend) { destroy(backend); },
    /*executor_bytes=*/[](const lococo_module_backend* backend) { return backend->impl.executor_bytes(); },
    /*create=*/
    [](lococo_module_backend* backend, lococo_module_executor** out, lococo_module_error* error) {
      return guarded(error, [&] {
        const DeviceScope scope(backend->impl.device());
        *out = new lococo_module_executor(backend->impl);
      });
    },
    /*destroy=*/[](lococo_module_executor* executor) { destroy(executor); },
    /*forward=*/
    [](lococo_module_executor* executor, const lococo_module_forward* f, float* all_logits,
       lococo_module_error* error) {
      return with_executor(executor, error, [&](Executor& e) { e.forward(*f, all_logits); });
    },
    /*finish=*/
    [](lococo_module_executor* executor, lococo_module_error* error) {
      return with_executor(executor, error, [](Executor& e) { e.finish(); });
    },
    /*run_window=*/
    [](lococo_module_executor* executor, int64_t position, int32_t* ids, double* idle_seconds,
       lococo_module_error* error) {
      return with_executor(executor, error, [&](Executor& e) { *idle_seconds = e.run_window(position, ids); });
    },
    /*end_window=*/
    [](lococo_module_executor* executor, int32_t keep, lococo_module_error* error) {
      return with_executor(executor, error, [&](Executor& e) { e.end_window(keep != 0); });
    },
    /*logits=*/
    [](lococo_module_executor* executor, const float** logits, lococo_module_error* error) {
      return with_executor(executor, error, [&](Executor& e) { *logits = e.logits(); });
    },
    /*reset=*/
    [](lococo_module_executor* executor, lococo_module_error* error) {
      return with_executor(executor, error, [](Executor& e) { e.reset(); });
    },
    /*read_state=*/
    [](lococo_module_executor* executor, uint8_t* bytes, lococo_module_error* error) {
      return with_executor(executor, error, [&](Executor& e) { e.read_state(bytes); });
    },
    /*write_state=*/
    [](lococo_module_executor* executor, const uint8_t* bytes, lococo_module_error* error) {
      return with_executor(executor, error, [&](Executor& e) { e.write_state(bytes); });
    },
    /*copy_state=*/
    [](lococo_module_executor* to, lococo_module_executor* from, lococo_module_error* error) {
      return with_executor(to, error, [&](Executor& e) { e.copy_state(from->impl); });
    },
};

}  // namespace

void lococo::log_line(lococo_log_level level, const std::string& text) noexcept {
  if (const lococo_module_host* host = the_host) {
    host->log(level, text.c_str());
  } else {  // whoever builds engines
    std::fprintf(stderr, "  note: %s\n", text.c_str());
  }
}

// For whoever builds engines: makes the plugin known to the TensorRT of this process. error: at least 3072 bytes.
extern "C" LOCOCO_API int32_t lococo_register_plugin(char* error) {
  lococo_module_error text{};
  const lococo_status status = guarded(&text, [] {
    (void)lococo::trt::load_tensorrt(the_host);
    lococo::trt::require_kernels();
  });
  std::snprintf(error, sizeof text.text, "%s", text.text);
  return status;
}

extern "C" LOCOCO_API const lococo_module* lococo_backend_module(uint32_t abi) {
  return abi == LOCOCO_MODULE_ABI ? &kModule : nullptr;
}
