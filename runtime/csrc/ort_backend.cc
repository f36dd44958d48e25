// The ONNX Runtime backend, CPU: one arena of host memory a session, bound once to every graph that it runs.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "backend.h"
#include "error.h"
#include "ort_runtime.h"

namespace lococo {
namespace {

using ort::Owner;
using ort::Runtime;

constexpr uint64_t kAlignment = 64;  // a cache line, and the widest vector loads

ort::ElementType element_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
      return ort::kFloat16;
    case Dtype::kBfloat16:
      return ort::kBfloat16;
    case Dtype::kInt32:
      return ort::kInt32;
    case Dtype::kInt64:
      return ort::kInt64;
    default:
      return ort::kFloat32;
  }
}

// Where each tensor lies in an executor's arena. There are two sets of state: a fusion reads one and writes the other.
struct Layout {
  enum class Set { kShared, kCurrent, kOther };
  struct Place {
    uint64_t offset;
    Set set;
  };

  std::unordered_map<std::string, Place> places;  // by name of graph input or output
  uint64_t set_bytes = 0;                         // of one set; set 0 lies at 0, set 1 at set_bytes, the rest behind
  uint64_t total_bytes = 0;

  explicit Layout(const Manifest& m) {
    for (const TensorSpec& t : m.state) {
      if (is_cache(t)) places[t.name] = {take(set_bytes, t.nbytes()), Set::kCurrent};
    }
    for (const TensorSpec& t : m.graph(GraphKind::kFusion, 1).outputs) {  // present.* is past_key_values.* afterwards
      const size_t dot = t.name.find('.');
      const std::string past = (t.name[dot - 1] == 't' ? "past_key_values" : "past_scores") + t.name.substr(dot);
      places[t.name] = {places.at(past).offset, Set::kOther};
    }
    total_bytes = 2 * set_bytes;
    for (const int32_t width : m.widths) {
      const GraphSpec& decoder = m.graph(GraphKind::kDecoder, width);
      for (const auto* list : {&decoder.inputs, &decoder.outputs}) {
        for (const TensorSpec& t : *list) {
          if (!is_cache(t)) widest[t.name] = std::max(widest[t.name], t.nbytes());
        }
      }
    }
    for (const auto& [name, nbytes] : widest) places[name] = {take(total_bytes, nbytes), Set::kShared};
  }

 private:
  std::map<std::string, uint64_t> widest;  // bytes of a tensor in the widest graph that has it

  static bool is_cache(const TensorSpec& t) {
    return t.name.rfind("past_", 0) == 0 && t.name.find('.') != std::string::npos;
  }

  static uint64_t take(uint64_t& end, uint64_t nbytes) {
    const uint64_t offset = end;
    end += (nbytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  }
};

class OrtBackend final : public Backend {
 public:
  OrtBackend(const Manifest& manifest, const BackendOptions& options)
      : manifest_(manifest), layout_(manifest), runtime_(Runtime::get(options)) {
    ort::MemoryInfo* info = nullptr;
    runtime_.check(runtime_.api().CreateCpuMemoryInfo(ort::kDeviceAllocator, ort::kDefaultMemory, &info),
                   "describe memory");
    memory_info_ = {info, runtime_.api().ReleaseMemoryInfo};
    ort::RunOptions* run_options = nullptr;
    runtime_.check(runtime_.api().CreateRunOptions(&run_options), "create run options");
    run_options_ = {run_options, runtime_.api().ReleaseRunOptions};
    try {
      for (const GraphKind kind : {GraphKind::kDecoder, GraphKind::kFusion}) (void)session(manifest.graph(kind, 1));
    } catch (const Error& e) {
      if (e.status() != LOCOCO_ERROR_UNSUPPORTED) throw;
      fail(LOCOCO_ERROR_UNSUPPORTED,
           "dtype %s: not supported on this CPU: %s; export with another dtype (float32 always runs)",
           manifest.dtype_text.c_str(), e.what());
    }
  }

  std::unique_ptr<Executor> create_executor() override;
  [[nodiscard]] uint64_t executor_bytes() const override { return layout_.total_bytes + kAlignment; }
  [[nodiscard]] const std::vector<int32_t>& widths() const override { return manifest_.widths; }

  [[nodiscard]] const Manifest& manifest() const { return manifest_; }
  [[nodiscard]] const Layout& layout() const { return layout_; }
  [[nodiscard]] const Runtime& runtime() const { return runtime_; }
  [[nodiscard]] const ort::RunOptions* run_options() const { return run_options_.get(); }

  // The loaded graph. All but the single-token ones are loaded when first needed: a short prompt never pays for a
  // block.
  ort::Session* session(const GraphSpec& spec) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto it = sessions_.find(spec.file);
    if (it == sessions_.end()) {
      const auto start = std::chrono::steady_clock::now();
      Owner<ort::Session> loaded(runtime_.load(manifest_.directory + "/" + spec.file), runtime_.api().ReleaseSession);
      const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
      log_line(LOCOCO_LOG_INFO, format("loaded %s in %.0f ms", spec.file.c_str(), elapsed.count()));
      it = sessions_.emplace(spec.file, std::move(loaded)).first;
    }
    return it->second.get();
  }

  void bind(ort::IoBinding* binding, const TensorSpec& t, bool is_input, void* data) const {
    const ort::Api& api = runtime_.api();
    ort::Value* raw = nullptr;
    runtime_.check(api.CreateTensorWithDataAsOrtValue(memory_info_.get(), data, t.nbytes(), t.shape.data(),
                                                      t.shape.size(), element_type(t.dtype), &raw),
                   ("make tensor " + t.name).c_str());
    const Owner<ort::Value> value(raw, api.ReleaseValue);  // the binding keeps its own reference
    runtime_.check((is_input ? api.BindInput : api.BindOutput)(binding, t.name.c_str(), raw),
                   ("bind " + t.name).c_str());
  }

 private:
  const Manifest& manifest_;
  const Layout layout_;
  const Runtime& runtime_;
  Owner<ort::MemoryInfo> memory_info_{nullptr, nullptr};
  Owner<ort::RunOptions> run_options_{nullptr, nullptr};
  std::mutex mutex_;                                               // of sessions_
  std::unordered_map<std::string, Owner<ort::Session>> sessions_;  // by file
};

class OrtExecutor final : public Executor {
 public:
  explicit OrtExecutor(OrtBackend& backend)
      : backend_(backend),
        m_(backend.manifest()),
        memory_(std::calloc(backend.layout().total_bytes + kAlignment, 1), std::free),
        arena_(aligned(memory_.get())),
        input_ids_(shared<int32_t>("input_ids")),
        position_ids_(shared<int32_t>("position_ids")),
        past_length_(shared<int32_t>("past_length")),
        num_tokens_(m_.block_size > 1 ? shared<int32_t>("num_tokens") : nullptr),
        logits_(shared<float>("logits")) {
    for (size_t i = 2; i < m_.state.size(); ++i) {  // past position and past_length: logits, then the cache
      const TensorSpec& t = m_.state[i];
      state_.push_back({backend_.layout().places.at(t.name), t.nbytes()});
      if (t.shape.size() < 3) continue;
      const bool is_score = t.shape.size() == 3;
      const std::string tail = t.name.substr(t.name.find('.'));
      const uint64_t column_bytes =
          is_score ? sizeof(float) : static_cast<uint64_t>(m_.head_dim) * dtype_bytes(m_.dtype);
      appended_.push_back({state_.back().place, shared<uint8_t>((is_score ? "scores" : "new_key_values") + tail),
                           column_bytes, is_score});
    }
  }

  void forward(const Forward& f, const int32_t* ids, int64_t position, int32_t length, float* all_logits) override {
    std::memcpy(input_ids_, ids, static_cast<size_t>(f.n) * sizeof *ids);
    std::memset(input_ids_ + f.n, 0, static_cast<size_t>(f.width - f.n) * sizeof *ids);
    *position_ids_ = static_cast<int32_t>(position);
    *past_length_ = length;
    if (num_tokens_ != nullptr) *num_tokens_ = f.n;
    run(GraphKind::kDecoder, f.width);
    if (all_logits == nullptr) return;
    const auto row = static_cast<size_t>(m_.vocab_size);
    if (f.width == 1) {
      std::memcpy(all_logits, logits_, row * sizeof(float));
    } else if (f.n == m_.block_size) {
      project(all_logits);
    } else {
      std::vector<float> block(static_cast<size_t>(m_.block_size) * row);
      project(block.data());
      std::memcpy(all_logits, block.data(), static_cast<size_t>(f.n) * row * sizeof(float));
    }
  }

  void append(const Forward& f, int32_t length) override {
    const auto capacity = static_cast<uint64_t>(m_.capacity);
    for (const Appended& a : appended_) {
      const uint64_t column = a.column_bytes;
      uint8_t* state = address(a.place);  // (H_kv, C, ...)
      const uint64_t new_columns = static_cast<uint64_t>(f.width) + (a.is_score ? capacity : 0);
      for (int32_t head = 0; head < m_.num_kv_heads; ++head) {
        uint8_t* to = state + static_cast<uint64_t>(head) * capacity * column;
        const uint8_t* from = a.source + static_cast<uint64_t>(head) * new_columns * column;
        const uint64_t offset = static_cast<uint64_t>(length) * column;
        if (a.is_score) {  // (H_kv, C + width): every old column has a new score too
          std::memcpy(to, from, offset);
          from += capacity * column;
        }
        std::memcpy(to + offset, from, static_cast<uint64_t>(f.n) * column);
      }
    }
  }

  void fuse(const Forward& f, int32_t /*length*/) override {
    run(GraphKind::kFusion, f.width);  // past_length and num_tokens still hold what the forward read
    current_ = 1 - current_;
  }

  const float* logits() override { return logits_; }

  void reset() override {
    std::memset(arena_, 0, backend_.layout().total_bytes);
    current_ = 0;
  }

  void read_state(uint8_t* bytes) override {
    for (const StateTensor& t : state_) {
      std::memcpy(bytes, address(t.place), t.nbytes);
      bytes += t.nbytes;
    }
  }

  void write_state(const uint8_t* bytes) override {
    for (const StateTensor& t : state_) {
      std::memcpy(address(t.place), bytes, t.nbytes);
      bytes += t.nbytes;
    }
  }

  void copy_from(Executor& other) override {
    const auto& source = static_cast<const OrtExecutor&>(other);
    for (const StateTensor& t : state_) std::memcpy(address(t.place), source.address(t.place), t.nbytes);
  }

 private:
  using Place = Layout::Place;
  struct StateTensor {
    Place place;
    uint64_t nbytes;
  };
  struct Appended {  // a state tensor that grows with a forward, and the forward's output that it grows by
    Place place;
    const uint8_t* source;
    uint64_t column_bytes;
    bool is_score;
  };

  // Pages that calloc takes from the system are zero, and cost nothing until they are used.
  static uint8_t* aligned(void* memory) {
    if (memory == nullptr) throw std::bad_alloc();
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + kAlignment - 1) / kAlignment * kAlignment);
  }

  [[nodiscard]] uint8_t* address(const Place& place) const { return address(place, current_); }
  [[nodiscard]] uint8_t* address(const Place& place, int current) const {
    const int set = place.set == Layout::Set::kCurrent ? current : place.set == Layout::Set::kOther ? 1 - current : 0;
    return arena_ + place.offset + static_cast<uint64_t>(set) * backend_.layout().set_bytes;
  }
  template <typename T>
  [[nodiscard]] T* shared(const std::string& name) const {
    return reinterpret_cast<T*>(arena_ + backend_.layout().places.at(name).offset);
  }

  [[nodiscard]] Owner<ort::IoBinding> new_binding(ort::Session* session) const {
    ort::IoBinding* raw = nullptr;
    backend_.runtime().check(backend_.runtime().api().CreateIoBinding(session, &raw), "create a binding");
    return {raw, backend_.runtime().api().ReleaseIoBinding};
  }

  // Bound once for each graph and set of state, then reused: nothing is allocated for a token.
  void run(GraphKind kind, int32_t width) {
    const auto key = std::make_pair(kind, width * 2 + current_);
    auto it = bound_.find(key);
    if (it == bound_.end()) {
      const GraphSpec& spec = m_.graph(kind, width);
      ort::Session* session = backend_.session(spec);
      Bound bound{session, new_binding(session)};
      const auto& places = backend_.layout().places;
      for (const TensorSpec& t : spec.inputs) backend_.bind(bound.binding.get(), t, true, address(places.at(t.name)));
      for (const TensorSpec& t : spec.outputs) backend_.bind(bound.binding.get(), t, false, address(places.at(t.name)));
      it = bound_.emplace(key, std::move(bound)).first;
    }
    run(it->second.session, it->second.binding.get());
  }

  // Logits of every row of hidden_states, [1, B, hidden] -> (B, vocab_size); rows behind the last forward's are stale.
  void project(float* logits) {
    const GraphSpec& spec = m_.graph(GraphKind::kLmHead, m_.block_size);
    ort::Session* session = backend_.session(spec);
    const Owner<ort::IoBinding> binding = new_binding(session);
    backend_.bind(binding.get(), spec.inputs[0], true, shared<uint8_t>("hidden_states"));
    backend_.bind(binding.get(), spec.outputs[0], false, logits);
    run(session, binding.get());
  }

  void run(ort::Session* session, const ort::IoBinding* binding) const {
    const Runtime& runtime = backend_.runtime();
    runtime.check(runtime.api().RunWithBinding(session, backend_.run_options(), binding), "run a graph");
  }

  struct Bound {
    ort::Session* session;
    Owner<ort::IoBinding> binding;
  };

  OrtBackend& backend_;
  const Manifest& m_;
  std::unique_ptr<void, void (*)(void*)> memory_;
  uint8_t* arena_;         // in it, aligned
  int32_t* input_ids_;     // [1, B]
  int32_t* position_ids_;  // [1]
  int32_t* past_length_;   // [1]
  int32_t* num_tokens_;    // [1]
  float* logits_;          // [1, vocab_size]
  int current_ = 0;        // the set of state that is live
  std::vector<StateTensor> state_;
  std::vector<Appended> appended_;
  std::map<std::pair<GraphKind, int32_t>, Bound> bound_;
};

std::unique_ptr<Executor> OrtBackend::create_executor() { return std::make_unique<OrtExecutor>(*this); }

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const Manifest& manifest, const BackendOptions& options) {
  return std::make_unique<OrtBackend>(manifest, options);
}

}  // namespace lococo
