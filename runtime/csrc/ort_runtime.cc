#include "ort_runtime.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
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

constexpr const char* kCudaHint =
    "it needs CUDA and cuDNN of the versions that it was built for: pip install 'onnxruntime-gpu[cuda,cudnn]', or name"
    " the folders of their libraries in $LD_LIBRARY_PATH";

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
  static const Runtime* runtime = nullptr;  // never freed: its threads may outlive the destructors of statics

  const std::lock_guard<std::mutex> lock(mutex);
  if (runtime != nullptr && options.library.empty() && options.num_threads == 0) return *runtime;
  // Since 1.29 it reports to its makers what runs where, unless it is told not to before its environment is made.
  if (runtime == nullptr) ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);
  std::string path;
  void* library = runtime != nullptr && options.library.empty() ? loaded_library : load_library(options, path);
  if (runtime != nullptr) {
    if (library != loaded_library) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT,
           "backend_library: this process already runs %s (ONNX Runtime %s), got %s; use one library a process",
           runtime->path_.c_str(), runtime->version().c_str(), path.c_str());
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
  runtime = new Runtime(*base, table, path, options.num_threads);
  loaded_library = library;
  log_line(LOCOCO_LOG_INFO, format("loaded ONNX Runtime %s from %s", runtime->version().c_str(), path.c_str()));
  return *runtime;
}

Runtime::Runtime(const ApiBase& base, void* const* table, std::string path, int32_t num_threads)
    : api_(table), version_(base.GetVersionString()), path_(std::move(path)), num_threads_(num_threads) {
  if (void* const* newer = base.GetApi(kCudaApiVersion)) cuda_api_.emplace(newer);
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
  const ErrorCode reason = api_.GetErrorCode(status);
  std::string text = api_.GetErrorMessage(status);
  const auto says = [&](const char* part) { return text.find(part) != std::string::npos; };
  lococo_status code = LOCOCO_ERROR_BACKEND;
  if (says("cuDNN is unavailable")) {
    code = LOCOCO_ERROR_NOT_FOUND;
    text = text + "; " + kCudaHint;
  } else if (reason == kNotImplemented || reason == kInvalidGraph || says("fallback to CPU EP")) {
    code = LOCOCO_ERROR_UNSUPPORTED;  // the file is whole: no operator for one of its types, or none on the device
  } else if (says("out of memory") || says("Failed to allocate memory")) {
    code = LOCOCO_ERROR_OUT_OF_MEMORY;
  }
  fail(code, "ONNX Runtime %s: cannot %s: %s", version_.c_str(), action, text.c_str());
}

const CudaApi& Runtime::cuda_api() const {
  char** names = nullptr;
  int count = 0;
  check(api_.GetAvailableProviders(&names, &count), "list its providers");
  std::string found;
  bool has_cuda = false;
  for (int i = 0; i < count; ++i) {
    found += (i > 0 ? ", " : "") + std::string(names[i]);
    has_cuda = has_cuda || std::strcmp(names[i], kCudaProvider) == 0;
  }
  check(api_.ReleaseAvailableProviders(names, count), "list its providers");
  if (has_cuda && cuda_api_) return *cuda_api_;
  fail(LOCOCO_ERROR_UNSUPPORTED,
       "%s: expected an ONNX Runtime with %s, got %s with %s; pip uninstall onnxruntime, then pip install"
       " 'onnxruntime-gpu[cuda,cudnn]', or name its library in options.backend_library or $LOCOCO_ONNXRUNTIME",
       path_.c_str(), kCudaProvider, version_.c_str(), found.c_str());
}

void Runtime::append_cuda(SessionOptions* options, int32_t device) const {
  const CudaApi& api = cuda_api();
  CudaProviderOptions* raw = nullptr;
  check(api.CreateCUDAProviderOptions(&raw), "create options of the CUDA provider");
  const Owner<CudaProviderOptions> owner(raw, api.ReleaseCUDAProviderOptions);
  check(api.SetDeterministicCompute(options, true), "ask for the same bits every time");
  const std::string index = std::to_string(device);
  // By default cuDNN times its algorithms and takes the fastest, now this one and now another: other bits every time.
  const char* const keys[] = {"device_id", "use_tf32", "arena_extend_strategy", "cudnn_conv_algo_search"};
  const char* const values[] = {index.c_str(), "0", "kSameAsRequested", "HEURISTIC"};
  try {  // the first of these loads the provider's library
    check(api.UpdateCUDAProviderOptions(raw, keys, values, std::size(keys)), "set up its CUDA provider");
    check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(options, raw), "load its CUDA provider");
  } catch (const Error& e) {
    fail(LOCOCO_ERROR_NOT_FOUND, "%s: %s; %s", path_.c_str(), e.what(), kCudaHint);
  }
}

Session* Runtime::load(const std::string& path, std::optional<int32_t> cuda_device) const {
  SessionOptions* raw = nullptr;
  check(api_.CreateSessionOptions(&raw), "create session options");
  const Owner<SessionOptions> options(raw, api_.ReleaseSessionOptions);
  check(api_.DisablePerSessionThreads(raw), "share the thread pool");
  check(api_.SetSessionGraphOptimizationLevel(raw, kOptimizeAll), "set the optimisation level");
  // A memory pattern holds a block's activations a second time, and measured no faster.
  check(api_.DisableMemPattern(raw), "disable the memory pattern");
  // Prepacking copies every weight into each graph's own memory; without it all graphs share the mapped file.
  check(api_.AddSessionConfigEntry(raw, "session.disable_prepacking", "1"), "disable prepacking");
  if (cuda_device) {
    append_cuda(raw, *cuda_device);
    check(api_.AddSessionConfigEntry(raw, "session.disable_cpu_ep_fallback", "1"), "keep nodes off the CPU");
  }
  Session* session = nullptr;
  check(api_.CreateSession(env_, path.c_str(), raw, &session), ("load " + path).c_str());
  return session;
}

}  // namespace lococo::ort
