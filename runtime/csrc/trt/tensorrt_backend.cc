// The TensorRT backend as liblococo sees it: checks everything that can be checked without TensorRT, loads
// liblococo_trt, and turns its table of C functions into a Backend.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "cuda_driver.h"
#include "error.h"
#include "module.h"
#include "trt/engines.h"
#include "trt/layout.h"

namespace lococo {
namespace {

using trt::Engines;
using trt::MappedFile;

constexpr const char* kModuleName = "liblococo_trt.so";

const lococo_module_host kHost = {[](lococo_log_level level, const char* text) { log_line(level, text); }};

// Calls a function of the module; a failure becomes an Error.
template <typename F, typename... Args>
void call(F* function, Args... args) {
  lococo_module_error error = {};
  const lococo_status status = function(args..., &error);
  if (status != LOCOCO_OK) throw Error(status, error.text);
}

// Beside this library.
std::string default_module_path() {
  Dl_info info = {};
  if (::dladdr(reinterpret_cast<const void*>(&default_module_path), &info) == 0 || info.dli_fname == nullptr) {
    return kModuleName;
  }
  const std::string self = info.dli_fname;
  const size_t slash = self.rfind('/');
  return (slash == std::string::npos ? "" : self.substr(0, slash + 1)) + kModuleName;
}

// The named library if one is named, else the one beside this library. Never unloaded: CUDA keeps threads and state.
const lococo_module& load_module(const std::string& named) {
  std::string path = named;
  const char* from_environment = std::getenv("LOCOCO_TRT_LIBRARY");
  if (path.empty() && from_environment != nullptr) path = from_environment;
  if (path.empty()) path = default_module_path();
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = ::dlerror();
    fail(LOCOCO_ERROR_NOT_FOUND,
         "TensorRT backend: cannot load %s: %s; build it against the installed TensorRT (cmake"
         " -DLOCOCO_TENSORRT_INCLUDE=...), or name it in options.backend_library or $LOCOCO_TRT_LIBRARY",
         path.c_str(), reason != nullptr ? reason : "unknown reason");
  }
  const auto entry = reinterpret_cast<lococo_backend_module_fn>(::dlsym(library, LOCOCO_MODULE_ENTRY));
  const lococo_module* module = entry != nullptr ? entry(LOCOCO_MODULE_ABI) : nullptr;
  if (module == nullptr || module->abi != LOCOCO_MODULE_ABI) {
    fail(LOCOCO_ERROR_VERSION, "%s: expected a backend module of ABI %d, got %s; build it again beside liblococo",
         path.c_str(), LOCOCO_MODULE_ABI, entry == nullptr ? "another library" : "another ABI");
  }
  return *module;
}

lococo_module_dtype module_dtype(const TensorSpec& t) {
  switch (t.dtype) {
    case Dtype::kFloat32:
      return LOCOCO_MODULE_FLOAT32;
    case Dtype::kFloat16:
      return LOCOCO_MODULE_FLOAT16;
    case Dtype::kBfloat16:
      return LOCOCO_MODULE_BFLOAT16;
    case Dtype::kInt32:
      return LOCOCO_MODULE_INT32;
    default:
      fail(LOCOCO_ERROR_INTERNAL, "%s: %s at a graph's boundary", t.name.c_str(), dtype_name(t.dtype));
  }
}

lococo_module_tensor module_tensor(const TensorSpec& t, bool is_input, bool is_weight, uint64_t offset) {
  lococo_module_tensor out{};
  out.name = t.name.c_str();
  out.dtype = module_dtype(t);
  if (t.shape.size() > LOCOCO_MODULE_MAX_RANK) fail(LOCOCO_ERROR_CORRUPT, "%s: too many axes", t.name.c_str());
  out.rank = static_cast<int32_t>(t.shape.size());
  for (size_t i = 0; i < t.shape.size(); ++i) out.shape[i] = t.shape[i];
  out.is_input = is_input ? 1 : 0;
  out.is_weight = is_weight ? 1 : 0;
  out.offset = offset;
  return out;
}

lococo_module_kind module_kind(GraphKind kind) {
  return kind == GraphKind::kDecoder  ? LOCOCO_MODULE_DECODER
         : kind == GraphKind::kFusion ? LOCOCO_MODULE_FUSION
                                      : LOCOCO_MODULE_LM_HEAD;
}

class TrtBackend final : public Backend {
 public:
  TrtBackend(const Manifest& m, const lococo_module& module, const Engines& engines, const CudaDevice& device,
             bool skip_hashes)
      : manifest_(m), module_(module), widths_(engines.widths), has_lm_head_(engines.has_lm_head) {
    const lococo_module_layout layout = trt::make_layout(m);
    std::vector<std::unique_ptr<MappedFile>> files;
    std::vector<std::vector<lococo_module_tensor>> tensors;
    std::vector<lococo_module_graph> graphs;
    for (const trt::Plan& plan : engines.plans) {
      files.push_back(std::make_unique<MappedFile>(plan.path));
      const MappedFile& file = *files.back();
      trt::check_plan(engines, plan, file, skip_hashes);
      const GraphSpec& spec = m.graph(plan.kind, plan.tokens);
      auto& list = tensors.emplace_back();
      for (const TensorSpec& t : spec.inputs) {
        list.push_back(module_tensor(t, true, false, trt::offset_of(layout, spec.kind, t)));
      }
      for (const TensorSpec& t : spec.outputs) {
        list.push_back(module_tensor(t, false, false, trt::offset_of(layout, spec.kind, t)));
      }
      for (const trt::WeightInput& w : plan.weights) {
        list.push_back(module_tensor(w.tensor, true, true, w.offset - engines.weights_offset));
      }
      graphs.push_back({module_kind(plan.kind), plan.tokens, plan.name.c_str(), file.data(), file.size(),
                        plan.workspace_bytes, list.data(), static_cast<int32_t>(list.size())});
    }
    std::unique_ptr<MappedFile> weights;
    if (engines.weights_bytes > 0) {
      weights = std::make_unique<MappedFile>(m.directory + "/model.onnx.data");  // its sha256 was checked before
      if (engines.weights_offset + engines.weights_bytes > weights->size()) {
        fail(LOCOCO_ERROR_CORRUPT, "%s/engines.json: weights end behind the end of model.onnx.data",
             engines.directory.c_str());
      }
    }
    lococo_module_bundle bundle{};
    bundle.device = device.index;
    bundle.vocab_size = m.vocab_size;
    bundle.num_layers = m.num_layers;
    bundle.num_kv_heads = m.num_kv_heads;
    bundle.head_dim = m.head_dim;
    bundle.mem_size = m.mem_size;
    bundle.capacity = m.capacity;
    bundle.block_size = m.block_size;
    bundle.element_bytes = static_cast<int32_t>(dtype_bytes(m.dtype));
    bundle.host_code_allowed = engines.version_compatible ? 1 : 0;
    bundle.weights = weights != nullptr ? weights->data() + engines.weights_offset : nullptr;
    bundle.weights_bytes = engines.weights_bytes;
    bundle.graphs = graphs.data();
    bundle.num_graphs = static_cast<int32_t>(graphs.size());
    bundle.layout = layout;
    call(module.open, static_cast<const lococo_module_bundle*>(&bundle), &handle_);
  }
  ~TrtBackend() override { module_.close(handle_); }

  std::unique_ptr<Executor> create_executor() override;
  [[nodiscard]] uint64_t executor_bytes() const override { return module_.executor_bytes(handle_); }
  [[nodiscard]] const std::vector<int32_t>& widths() const override { return widths_; }
  [[nodiscard]] bool has_all_logits() const override { return has_lm_head_; }

  [[nodiscard]] const Manifest& manifest() const { return manifest_; }
  [[nodiscard]] const lococo_module& module() const { return module_; }
  [[nodiscard]] lococo_module_backend* handle() const { return handle_; }

 private:
  const Manifest& manifest_;
  const lococo_module& module_;
  std::vector<int32_t> widths_;
  bool has_lm_head_;
  lococo_module_backend* handle_ = nullptr;
};

class TrtExecutor final : public Executor {
 public:
  explicit TrtExecutor(TrtBackend& backend)
      : module_(backend.module()), window_(trt::window_tokens(backend.manifest())) {
    call(module_.create, backend.handle(), &handle_);
  }
  ~TrtExecutor() override { module_.destroy(handle_); }

  // One launch does the whole of it: the forward, and the append or fusion that follows it.
  void forward(const Forward& f, const int32_t* ids, int64_t position, int32_t length, float* all_logits) override {
    const lococo_module_forward forward = {ids, f.n, f.width, length, position, f.fuses ? 1 : 0};
    call(module_.forward, handle_, &forward, all_logits);
  }
  void append(const Forward& /*f*/, int32_t /*length*/) override {}
  void fuse(const Forward& /*f*/, int32_t /*length*/) override {}
  void finish() override { call(module_.finish, handle_); }

  [[nodiscard]] int32_t window() const override { return window_; }
  double run_window(int64_t position, int32_t* ids) override {
    double idle_seconds = 0.0;
    call(module_.run_window, handle_, position, ids, &idle_seconds);
    return idle_seconds;
  }
  void end_window(bool keep) override { call(module_.end_window, handle_, keep ? 1 : 0); }

  const float* logits() override {
    const float* logits = nullptr;
    call(module_.logits, handle_, &logits);
    return logits;
  }
  void reset() override { call(module_.reset, handle_); }
  void read_state(uint8_t* bytes) override { call(module_.read_state, handle_, bytes); }
  void write_state(const uint8_t* bytes) override { call(module_.write_state, handle_, bytes); }
  void copy_from(Executor& other) override {
    call(module_.copy_state, handle_, static_cast<TrtExecutor&>(other).handle_);
  }

 private:
  const lococo_module& module_;
  const int32_t window_;
  lococo_module_executor* handle_ = nullptr;
};

std::unique_ptr<Executor> TrtBackend::create_executor() { return std::make_unique<TrtExecutor>(*this); }

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const Manifest& manifest, const BackendOptions& options, int32_t device_index) {
  // The device first: without a working driver TensorRT answers with garbage, not with an error.
  const CudaDevice device = query_cuda_device(device_index);
  const lococo_module& module = load_module(options.library);
  check_driver(device, module.cuda_version);
  const char* version = "";
  call(module.load, &kHost, &version);
  const Engines engines = trt::choose_engines(manifest, {version, device.sm, device.text()});
  log_line(LOCOCO_LOG_INFO,
           format("TensorRT %s, %s, engines %s", version, device.text().c_str(), engines.directory.c_str()));
  return std::make_unique<TrtBackend>(manifest, module, engines, device, options.skip_hashes);
}

}  // namespace lococo
