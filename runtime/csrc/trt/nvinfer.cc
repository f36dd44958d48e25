// TensorRT 8.6 to 11. Its library exports next to nothing: everything but two functions is inline virtual calls of its
// headers, appended to within a major version and shifted between majors. So this file is compiled against the
// installed version, and refuses a library of another major, or one older than its headers.
#include "trt/nvinfer.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <mutex>

#include "error.h"
#include "trt/plugin.h"

#if NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR < 806
#error "TensorRT 8.6 or newer is needed"
#endif
#define LOCOCO_MEMORY_V2 (NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1001)

namespace lococo::trt {
namespace {

using nvinfer1::DataType;

// TensorRT's messages become log lines; the last errors are kept for our own texts.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity == Severity::kVERBOSE) return;
    const bool is_error = severity == Severity::kINTERNAL_ERROR || severity == Severity::kERROR;
    if (is_error) {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::snprintf(last_.data(), last_.size(), "%s", text);
    }
    if (host_ == nullptr) return;
    std::array<char, 2048> line;
    std::snprintf(line.data(), line.size(), "tensorrt: %s", text);
    host_->log(is_error                         ? LOCOCO_LOG_ERROR
               : severity == Severity::kWARNING ? LOCOCO_LOG_WARNING
                                                : LOCOCO_LOG_INFO,
               line.data());
  }

  void set_host(const lococo_module_host* host) { host_ = host; }

  std::string last() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string text = last_[0] != '\0' ? last_.data() : "it gives no reason";
    last_[0] = '\0';
    return text;
  }

 private:
  std::mutex mutex_;
  std::array<char, 1024> last_{};
  const lococo_module_host* host_ = nullptr;
};

Logger& logger() {
  static auto* const instance = new Logger;  // never freed: TensorRT may log until the process ends
  return *instance;
}

struct Version {
  int major, minor, patch;
  [[nodiscard]] std::string text() const { return format("%d.%d.%d", major, minor, patch); }
};

// 8600 is 8.6.0; from TensorRT 10 on, 101500 is 10.15.0.
Version decode(int number) {
  if (number >= 10000) return {number / 10000, number / 100 % 100, number % 100};
  return {number / 1000, number / 100 % 10, number % 100};
}

constexpr Version kCompiled = {NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH};

struct Library {
  using CreateRuntime = void* (*)(void* logger, int32_t version);
  using GetVersion = int32_t (*)();
  using GetRegistry = nvinfer1::IPluginRegistry* (*)();

  std::string version;
  CreateRuntime create_runtime = nullptr;

  Library() {
    std::string path = format("libnvinfer.so.%d", NV_TENSORRT_MAJOR);
    if (const char* named = std::getenv("LOCOCO_NVINFER"); named != nullptr && *named != '\0') path = named;
    void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* reason = ::dlerror();
      fail(LOCOCO_ERROR_NOT_FOUND,
           "TensorRT: cannot load %s: %s; install TensorRT %d, add its folder to LD_LIBRARY_PATH, or name the library"
           " in $LOCOCO_NVINFER",
           path.c_str(), reason != nullptr ? reason : "unknown reason", NV_TENSORRT_MAJOR);
    }
    const auto get_version = reinterpret_cast<GetVersion>(::dlsym(library, "getInferLibVersion"));
    create_runtime = reinterpret_cast<CreateRuntime>(::dlsym(library, "createInferRuntime_INTERNAL"));
    const auto get_registry = reinterpret_cast<GetRegistry>(::dlsym(library, "getPluginRegistry"));
    if (get_version == nullptr || create_runtime == nullptr || get_registry == nullptr) {
      ::dlclose(library);
      fail(LOCOCO_ERROR_UNSUPPORTED, "%s: expected TensorRT's runtime, got another library", path.c_str());
    }
    const Version found = decode(get_version());
    version = found.text();
    const bool older = found.minor * 100 + found.patch < kCompiled.minor * 100 + kCompiled.patch;
    if (found.major != kCompiled.major || older) {
      ::dlclose(library);
      fail(LOCOCO_ERROR_VERSION,
           "%s: expected TensorRT %s or newer of the same major, which liblococo_trt was compiled for, found %s;"
           " compile liblococo_trt with the headers of the installed version",
           path.c_str(), kCompiled.text().c_str(), version.c_str());
    }
    nvinfer1::IPluginRegistry* const registry = get_registry();
    if (registry == nullptr) fail(LOCOCO_ERROR_BACKEND, "%s: TensorRT has no plugin registry", path.c_str());
    register_plugin(*registry);
  }
};

const Library& library() {
  static const Library instance;  // tried again after a failure
  return instance;
}

[[noreturn]] void fail_tensorrt(const std::string& name, const char* action) {
  const std::string reason = logger().last();
  const cudaError_t code = cudaGetLastError();
  fail(LOCOCO_ERROR_BACKEND, "%s: TensorRT %s cannot %s: %s%s%s", name.c_str(), library().version.c_str(), action,
       reason.c_str(), code == cudaSuccess ? "" : "; CUDA: ", code == cudaSuccess ? "" : cudaGetErrorName(code));
}

bool is_dtype(DataType got, lococo_module_dtype expected) {
  switch (expected) {
    case LOCOCO_MODULE_FLOAT32:
      return got == DataType::kFLOAT;
    case LOCOCO_MODULE_FLOAT16:
      return got == DataType::kHALF;
    case LOCOCO_MODULE_INT32:
      return got == DataType::kINT32;
    case LOCOCO_MODULE_BFLOAT16:
#if NV_TENSORRT_MAJOR >= 9
      return got == DataType::kBF16;
#else
      return false;
#endif
  }
  return false;
}

}  // namespace

const char* load_tensorrt(const lococo_module_host* host) {
  logger().set_host(host);
  return library().version.c_str();
}

void Deleter::operator()(nvinfer1::IRuntime* p) const { delete p; }
void Deleter::operator()(nvinfer1::ICudaEngine* p) const { delete p; }
void Deleter::operator()(nvinfer1::IExecutionContext* p) const { delete p; }

std::unique_ptr<nvinfer1::IRuntime, Deleter> create_runtime(bool host_code_allowed) {
  auto* raw = static_cast<nvinfer1::IRuntime*>(library().create_runtime(&logger(), NV_TENSORRT_VERSION));
  if (raw == nullptr) fail_tensorrt("runtime", "start");
  std::unique_ptr<nvinfer1::IRuntime, Deleter> runtime(raw);
  if (host_code_allowed) runtime->setEngineHostCodeAllowed(true);
  return runtime;
}

Engine::Engine(nvinfer1::IRuntime& runtime, const lococo_module_graph& graph)
    : engine_(runtime.deserializeCudaEngine(graph.plan, graph.plan_bytes)), name_(graph.name) {
  if (engine_ == nullptr) fail_tensorrt(name_, "load the plan");
  check_tensors(graph);
}

void Engine::check_tensors(const lococo_module_graph& graph) const {
  if (engine_->getNbIOTensors() != graph.num_tensors) {
    fail(LOCOCO_ERROR_CORRUPT, "%s: expected %d inputs and outputs, the plan has %d; run lococo-build --force",
         name_.c_str(), graph.num_tensors, engine_->getNbIOTensors());
  }
  for (int32_t i = 0; i < graph.num_tensors; ++i) {
    const lococo_module_tensor& t = graph.tensors[i];
    const auto mode = t.is_input != 0 ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
    bool same = engine_->getTensorIOMode(t.name) == mode;  // kNONE for a tensor that is not there
    if (same) {
      const nvinfer1::Dims shape = engine_->getTensorShape(t.name);
      same = shape.nbDims == t.rank && is_dtype(engine_->getTensorDataType(t.name), t.dtype) &&
             engine_->getTensorLocation(t.name) == nvinfer1::TensorLocation::kDEVICE &&
             engine_->getTensorFormat(t.name) == nvinfer1::TensorFormat::kLINEAR;
      for (int32_t j = 0; same && j < t.rank; ++j) same = shape.d[j] == t.shape[j];
    }
    if (!same) {
      fail(LOCOCO_ERROR_CORRUPT,
           "%s: %s: the plan has no such %s of the bundle's shape and dtype; run lococo-build"
           " --force",
           name_.c_str(), t.name, t.is_input != 0 ? "input" : "output");
    }
  }
}

uint64_t Engine::workspace_bytes() const {
#if LOCOCO_MEMORY_V2
  return static_cast<uint64_t>(engine_->getDeviceMemorySizeV2());
#else
  return engine_->getDeviceMemorySize();
#endif
}

Context Engine::create_context() const {
#if NV_TENSORRT_MAJOR >= 10
  auto* context = engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
#else
  auto* context = engine_->createExecutionContextWithoutDeviceMemory();
#endif
  if (context == nullptr) fail_tensorrt(name_, "create an execution context");
  return {context, name_};
}

void Context::set_workspace(void* memory, uint64_t nbytes) {
#if LOCOCO_MEMORY_V2
  context_->setDeviceMemoryV2(memory, static_cast<int64_t>(nbytes));
#else
  (void)nbytes;
  context_->setDeviceMemory(memory);
#endif
}

void Context::bind(const char* tensor, void* address) {
  if (!context_->setTensorAddress(tensor, address)) fail_tensorrt(name_ + ": " + tensor, "bind it");
}

void Context::enqueue(cudaStream_t stream) {
  if (!context_->enqueueV3(stream)) fail_tensorrt(name_, "run");
}

}  // namespace lococo::trt
