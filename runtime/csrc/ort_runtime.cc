#include "ort_runtime.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#include "error.h"

namespace lococo::ort {
namespace {

// The named library if one is named, else the loader's search path: never another one than asked for.
void* load_library(const BackendOptions& options, std::string& path) {
  std::vector<std::string> candidates = {"libonnxruntime.so.1", "libonnxruntime.so"};
  const char* from_environment = std::getenv("LOCOCO_ONNXRUNTIME");
  if (!options.library.empty()) {
    candidates = {options.library};
  } else if (from_environment != nullptr && *from_environment != '\0') {
    candidates = {from_environment};
  }
  std::string tried;
  for (const std::string& candidate : candidates) {
    if (void* library = ::dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL)) {
      path = candidate;
      return library;
    }
    const char* reason = ::dlerror();
    tried += "\n  " + candidate + ": " + (reason != nullptr ? reason : "unknown reason");
  }
  fail(LOCOCO_ERROR_NOT_FOUND,
       "ONNX Runtime: no library could be loaded; tried:%s\nInstall onnxruntime, or name its library in"
       " options.backend_library or $LOCOCO_ONNXRUNTIME",
       tried.c_str());
}

// ONNX Runtime's own warnings become log lines.
void forward_log(void* /*user*/, LogLevel level, const char* /*category*/, const char* /*id*/, const char* location,
                 const char* message) {
  const lococo_log_level mapped = level >= kLogError     ? LOCOCO_LOG_ERROR
                                  : level >= kLogWarning ? LOCOCO_LOG_WARNING
                                                         : LOCOCO_LOG_INFO;
  log_line(mapped, format("onnxruntime: %s (%s)", message, location));
}

}  // namespace

const Runtime& Runtime::get(const BackendOptions& options) {
  static std::mutex mutex;
  static void* loaded_library = nullptr;
  static std::string loaded_path;
  static const Runtime* runtime = nullptr;  // never freed: its threads may outlive the destructors of statics

  const std::lock_guard<std::mutex> lock(mutex);
  if (runtime != nullptr && options.library.empty() && options.num_threads == 0) return *runtime;
  std::string path;
  void* library = runtime != nullptr && options.library.empty() ? loaded_library : load_library(options, path);
  if (runtime != nullptr) {
    if (library != loaded_library) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT,
           "backend_library: this process already runs %s (ONNX Runtime %s), got %s; use one library a process",
           loaded_path.c_str(), runtime->version().c_str(), path.c_str());
    }
    if (options.num_threads != 0 && options.num_threads != runtime->num_threads_) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT,
           "num_threads: the first model of this process asked for %d (0: one per core), got %d; pass that or 0",
           runtime->num_threads_, options.num_threads);
    }
    return *runtime;
  }
  using GetApiBase = const ApiBase* (*)();
  const auto get_api_base = reinterpret_cast<GetApiBase>(::dlsym(library, "OrtGetApiBase"));
  const ApiBase* base = get_api_base != nullptr ? get_api_base() : nullptr;
  void* const* table = base != nullptr ? base->GetApi(kApiVersion) : nullptr;
  if (table == nullptr) {
    const char* version = base != nullptr ? base->GetVersionString() : "no OrtGetApiBase in it";
    ::dlclose(library);
    fail(LOCOCO_ERROR_UNSUPPORTED, "%s: expected ONNX Runtime 1.8 or later, got %s", path.c_str(), version);
  }
  runtime = new Runtime(*base, table, options.num_threads);
  loaded_library = library;
  loaded_path = path;
  log_line(LOCOCO_LOG_INFO, format("ONNX Runtime %s from %s", runtime->version().c_str(), path.c_str()));
  return *runtime;
}

Runtime::Runtime(const ApiBase& base, void* const* table, int32_t num_threads)
    : api_(table), version_(base.GetVersionString()), num_threads_(num_threads) {
  ThreadingOptions* raw = nullptr;
  check(api_.CreateThreadingOptions(&raw), "create threading options");
  const Owner<ThreadingOptions> threading(raw, api_.ReleaseThreadingOptions);
  check(api_.SetGlobalIntraOpNumThreads(raw, num_threads), "set the number of threads");
  check(api_.SetGlobalInterOpNumThreads(raw, 1), "set the number of threads");  // graphs run one node at a time
  check(api_.CreateEnvWithCustomLoggerAndGlobalThreadPools(forward_log, nullptr, kLogWarning, "lococo", raw, &env_),
        "create the environment");
}

void Runtime::check(Status* status, const char* action) const {
  if (status == nullptr) return;
  const Owner<Status> owner(status, api_.ReleaseStatus);
  const lococo_status code =
      api_.GetErrorCode(status) == kNotImplemented ? LOCOCO_ERROR_UNSUPPORTED : LOCOCO_ERROR_BACKEND;
  fail(code, "ONNX Runtime %s: cannot %s: %s", version_.c_str(), action, api_.GetErrorMessage(status));
}

Session* Runtime::load(const std::string& path) const {
  SessionOptions* raw = nullptr;
  check(api_.CreateSessionOptions(&raw), "create session options");
  const Owner<SessionOptions> options(raw, api_.ReleaseSessionOptions);
  check(api_.DisablePerSessionThreads(raw), "share the thread pool");
  check(api_.SetSessionGraphOptimizationLevel(raw, kOptimizeAll), "set the optimisation level");
  // A memory pattern holds a block's activations a second time, and measured no faster.
  check(api_.DisableMemPattern(raw), "disable the memory pattern");
  // Prepacking copies every weight into each graph's own memory; without it all graphs share the mapped file.
  check(api_.AddSessionConfigEntry(raw, "session.disable_prepacking", "1"), "disable prepacking");
  Session* session = nullptr;
  check(api_.CreateSession(env_, path.c_str(), raw, &session), ("load " + path).c_str());
  return session;
}

}  // namespace lococo::ort
