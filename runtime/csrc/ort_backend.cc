// The ONNX Runtime backend, on the CPU or a CUDA device: one arena of memory a session or a batch, bound once to every
// graph that it runs.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "backend.h"
#include "error.h"
#include "memory.h"
#include "ort_runtime.h"

namespace lococo {
namespace {

using ort::Owner;
using ort::Runtime;

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

// K, V or accumulated scores: past_*.{layer}...
bool is_cache(const TensorSpec& t) { return t.name.rfind("past_", 0) == 0 && t.name.find('.') != std::string::npos; }

bool is_score(const TensorSpec& cache) { return cache.shape.size() == 3; }

// The tensor that goes with one of the cache: {prefix}.{layer}... for K and V, {score_prefix}.{layer} for scores.
std::string counterpart(const TensorSpec& cache, const char* prefix, const char* score_prefix) {
  return (is_score(cache) ? score_prefix : prefix) + cache.name.substr(cache.name.find('.'));
}

// Adds what a forward of n tokens gave, `source` (H_kv, width, d) or (H_kv, C + width), to the columns from `length` on
// of `state`, a tensor of the cache.
void append_columns(const Memory& memory, const Manifest& m, const TensorSpec& cache, uint8_t* state,
                    const uint8_t* source, int32_t width, int32_t n, int32_t length) {
  const auto heads = static_cast<uint64_t>(m.num_kv_heads);
  const auto capacity = static_cast<uint64_t>(m.capacity);
  const uint64_t column = cache.nbytes() / heads / capacity;
  const uint64_t row = capacity * column;
  const uint64_t new_row = static_cast<uint64_t>(width) * column + (is_score(cache) ? row : 0);
  const uint64_t offset = static_cast<uint64_t>(length) * column;
  if (is_score(cache)) {  // every old column has a new score too
    memory.copy_rows({state, row}, {source, new_row}, offset, heads);
    source += row;
  }
  memory.copy_rows({state + offset, row}, {source, new_row}, static_cast<uint64_t>(n) * column, heads);
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
  uint64_t inputs = 0, inputs_bytes = 0;          // token ids, position and lengths, together
  uint64_t total_bytes = 0;

  explicit Layout(const Manifest& m) {
    for (const TensorSpec& t : m.state) {
      if (is_cache(t)) places[t.name] = {Arena::take(set_bytes, t.nbytes()), Set::kCurrent};
    }
    for (const TensorSpec& t : m.state) {  // present.* is past_key_values.* after a fusion
      if (is_cache(t)) places[counterpart(t, "present", "present_scores")] = {places.at(t.name).offset, Set::kOther};
    }
    inputs = total_bytes = 2 * set_bytes;
    take_shared(m, &GraphSpec::inputs);
    inputs_bytes = total_bytes - inputs;
    take_shared(m, &GraphSpec::outputs);
  }

 private:
  // What the decoders read or write, as large as in the widest one that has it.
  void take_shared(const Manifest& m, std::vector<TensorSpec> GraphSpec::*list) {
    std::map<std::string, uint64_t> widest;
    for (const int32_t width : m.widths) {
      for (const TensorSpec& t : m.graph(GraphKind::kDecoder, width).*list) {
        if (!is_cache(t)) widest[t.name] = std::max(widest[t.name], t.nbytes());
      }
    }
    for (const auto& [name, nbytes] : widest) places[name] = {Arena::take(total_bytes, nbytes), Set::kShared};
  }
};

// Where each tensor lies in a batch's arena, by name of graph input or output: all rows of the decoder's, one of the
// fusion's output, which is copied to its row afterwards. The rows' logits come last, (max_batch, vocab_size) float32:
// what the decoder writes covers all rows, those that rest included.
struct BatchLayout {
  std::unordered_map<std::string, uint64_t> places;
  uint64_t inputs_bytes = 0;  // token ids, positions and lengths, at the beginning
  uint64_t logits = 0;
  uint64_t total_bytes = 0;

  explicit BatchLayout(const Manifest& m) {
    if (!m.batch_decoder) return;
    const GraphSpec& decoder = *m.batch_decoder;
    const auto add = [&](const TensorSpec& t) { places[t.name] = Arena::take(total_bytes, t.nbytes()); };
    for (const TensorSpec& t : decoder.inputs) {
      if (!is_cache(t)) add(t);
    }
    inputs_bytes = total_bytes;
    for (const TensorSpec& t : decoder.inputs) {
      if (is_cache(t)) add(t);
    }
    for (const auto* list : {&decoder.outputs, &m.graph(GraphKind::kFusion, 1).outputs}) {
      for (const TensorSpec& t : *list) add(t);
    }
    logits = Arena::take(total_bytes, decoder.outputs.front().nbytes());
  }
};

class OrtBackend final : public Backend {
 public:
  // cuda_device: none for the CPU.
  OrtBackend(const Manifest& manifest, const BackendOptions& options, const std::optional<CudaDevice>& cuda_device)
      : manifest_(manifest),
        stored_(manifest.state.begin() + 2, manifest.state.end()),
        layout_(manifest),
        batch_layout_(manifest),
        runtime_(Runtime::get(options)),
        memory_(cuda_device ? make_cuda_memory(*cuda_device) : make_host_memory()) {
    log_line(LOCOCO_LOG_INFO, format("ONNX Runtime %s on %s", runtime_.version().c_str(),
                                     cuda_device ? cuda_device->text().c_str() : "cpu"));
    const ort::Api& api = runtime_.api();
    ort::MemoryInfo* info = nullptr;
    runtime_.check(api.CreateCpuMemoryInfo(ort::kDeviceAllocator, ort::kDefaultMemory, &info), "describe memory");
    host_info_ = {info, api.ReleaseMemoryInfo};
    if (cuda_device) {
      (void)runtime_.cuda_api();  // without it, the dtype would be blamed below
      cuda_device_ = cuda_device->index;
      runtime_.check(
          api.CreateMemoryInfo(ort::kCudaMemory, ort::kDeviceAllocator, cuda_device->index, ort::kDefaultMemory, &info),
          "describe memory");
      device_info_ = {info, api.ReleaseMemoryInfo};
    }
    ort::RunOptions* run_options = nullptr;
    runtime_.check(api.CreateRunOptions(&run_options), "create run options");
    run_options_ = {run_options, api.ReleaseRunOptions};
    try {
      for (const GraphKind kind : {GraphKind::kDecoder, GraphKind::kFusion}) (void)session(manifest.graph(kind, 1));
    } catch (const Error& e) {
      if (e.status() != LOCOCO_ERROR_UNSUPPORTED || manifest.dtype == Dtype::kFloat32) throw;
      fail(LOCOCO_ERROR_UNSUPPORTED,
           "dtype: expected one that ONNX Runtime runs on %s (float32 always does), got %s: %s; export with another"
           " dtype%s",
           cuda_device ? cuda_device->text().c_str() : "this CPU", manifest.dtype_text.c_str(), e.what(),
           cuda_device ? ", or use backend \"tensorrt\" with engines made by lococo-build" : "");
    }
  }
  ~OrtBackend() override {
    const Memory::Scope scope(*memory_);
    sessions_.clear();
  }

  // What CUDA loads at a first run is loaded, or found missing, here and not in the middle of a text.
  void warm_up();

  std::unique_ptr<Executor> create_executor() override;
  [[nodiscard]] uint64_t executor_bytes() const override { return Arena::nbytes(layout_.total_bytes); }
  [[nodiscard]] const std::vector<int32_t>& widths() const override { return manifest_.widths; }
  std::unique_ptr<BatchExecutor> create_batch() override;
  [[nodiscard]] uint64_t batch_bytes() const override {
    return manifest_.batch_decoder ? Arena::nbytes(batch_layout_.total_bytes) : 0;
  }

  [[nodiscard]] const Manifest& manifest() const { return manifest_; }
  // The state less position and past_length: logits, then the cache.
  [[nodiscard]] const std::vector<TensorSpec>& stored() const { return stored_; }
  [[nodiscard]] const Layout& layout() const { return layout_; }
  [[nodiscard]] const BatchLayout& batch_layout() const { return batch_layout_; }
  [[nodiscard]] const Memory& memory() const { return *memory_; }

  // The loaded graph. All but the single-token ones are loaded when first needed: a short prompt never pays for a
  // block.
  ort::Session* session(const GraphSpec& spec) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto it = sessions_.find(spec.file);
    if (it == sessions_.end()) {
      const auto start = std::chrono::steady_clock::now();
      const Memory::Scope scope(*memory_);
      Owner<ort::Session> loaded(runtime_.load(manifest_.directory + "/" + spec.file, cuda_device_),
                                 runtime_.api().ReleaseSession);
      const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
      log_line(LOCOCO_LOG_INFO, format("loaded %s in %.0f ms", spec.file.c_str(), elapsed.count()));
      it = sessions_.emplace(spec.file, std::move(loaded)).first;
    }
    return it->second.get();
  }

  [[nodiscard]] Owner<ort::IoBinding> new_binding(ort::Session* session) const {
    ort::IoBinding* raw = nullptr;
    runtime_.check(runtime_.api().CreateIoBinding(session, &raw), "create a binding");
    return {raw, runtime_.api().ReleaseIoBinding};
  }

  // Returns when the device is done: ONNX Runtime has a stream of its own.
  void run(ort::Session* session, const ort::IoBinding* binding) const {
    const Memory::Scope scope(*memory_);
    memory_->finish();
    runtime_.check(runtime_.api().RunWithBinding(session, run_options_.get(), binding), "run a graph");
  }

  // data: in memory(), or on the host, where ONNX Runtime copies an output to.
  void bind(ort::IoBinding* binding, const TensorSpec& t, bool is_input, void* data, bool on_host = false) const {
    const ort::Api& api = runtime_.api();
    const ort::MemoryInfo* info = on_host || device_info_ == nullptr ? host_info_.get() : device_info_.get();
    ort::Value* raw = nullptr;
    runtime_.check(api.CreateTensorWithDataAsOrtValue(info, data, t.nbytes(), t.shape.data(), t.shape.size(),
                                                      element_type(t.dtype), &raw),
                   ("make tensor " + t.name).c_str());
    const Owner<ort::Value> value(raw, api.ReleaseValue);  // the binding keeps its own reference
    runtime_.check((is_input ? api.BindInput : api.BindOutput)(binding, t.name.c_str(), raw),
                   ("bind " + t.name).c_str());
  }

 private:
  const Manifest& manifest_;
  const std::vector<TensorSpec> stored_;
  const Layout layout_;
  const BatchLayout batch_layout_;
  const Runtime& runtime_;
  const std::unique_ptr<const Memory> memory_;
  std::optional<int32_t> cuda_device_;
  Owner<ort::MemoryInfo> host_info_{nullptr, nullptr};
  Owner<ort::MemoryInfo> device_info_{nullptr, nullptr};  // NULL on the CPU
  Owner<ort::RunOptions> run_options_{nullptr, nullptr};
  std::mutex mutex_;                                               // of sessions_
  std::unordered_map<std::string, Owner<ort::Session>> sessions_;  // by file
};

// A graph bound to memory of ours: bound once, then reused, so that nothing is allocated for a token.
struct Bound {
  ort::Session* session = nullptr;
  Owner<ort::IoBinding> binding{nullptr, nullptr};
};

// The state of one sequence: in an arena of its own, or in a row of a batch.
class OrtSequence : public Executor {
 public:
  explicit OrtSequence(const OrtBackend& backend) : memory_(backend.memory()), stored_(backend.stored()) {}

  const float* logits() override {
    if (memory_.on_host()) return reinterpret_cast<const float*>(address(0));
    host_logits_.resize(stored_[0].nbytes() / sizeof(float));
    memory_.copy(host_logits_.data(), address(0), stored_[0].nbytes());
    memory_.finish();
    return host_logits_.data();
  }

  void finish() override { memory_.finish(); }

  void read_state(uint8_t* bytes) override {
    for (size_t i = 0; i < stored_.size(); bytes += stored_[i++].nbytes()) {
      memory_.copy(bytes, address(i), stored_[i].nbytes());
    }
    memory_.finish();
  }

  void write_state(const uint8_t* bytes) override {
    for (size_t i = 0; i < stored_.size(); bytes += stored_[i++].nbytes()) {
      memory_.copy(address(i), bytes, stored_[i].nbytes());
    }
    memory_.finish();
  }

  void copy_from(Executor& other) override {
    const auto& source = static_cast<const OrtSequence&>(other);
    for (size_t i = 0; i < stored_.size(); ++i) memory_.copy(address(i), source.address(i), stored_[i].nbytes());
    memory_.finish();
  }

 protected:
  // Of OrtBackend::stored()[i].
  [[nodiscard]] virtual uint8_t* address(size_t i) const = 0;

  const Memory& memory_;
  const std::vector<TensorSpec>& stored_;

 private:
  std::vector<float> host_logits_;  // (vocab_size), if they lie elsewhere
};

class OrtExecutor final : public OrtSequence {
 public:
  explicit OrtExecutor(OrtBackend& backend)
      : OrtSequence(backend),
        backend_(backend),
        m_(backend.manifest()),
        arena_(memory_, backend.layout().total_bytes),
        inputs_(backend.layout().inputs_bytes),
        input_ids_(input("input_ids")),
        position_ids_(input("position_ids")),
        past_length_(input("past_length")),
        num_tokens_(m_.block_size > 1 ? input("num_tokens") : nullptr) {
    for (const TensorSpec& t : stored_) {
      places_.push_back(backend_.layout().places.at(t.name));
      sources_.push_back(is_cache(t) ? shared(counterpart(t, "new_key_values", "scores")) : nullptr);
    }
  }

  void forward(const Forward& f, const int32_t* ids, int64_t position, int32_t length, float* all_logits) override {
    std::memcpy(input_ids_, ids, static_cast<size_t>(f.n) * sizeof *ids);
    std::memset(input_ids_ + f.n, 0, static_cast<size_t>(f.width - f.n) * sizeof *ids);
    *position_ids_ = static_cast<int32_t>(position);
    *past_length_ = length;
    if (num_tokens_ != nullptr) *num_tokens_ = f.n;
    memory_.copy(arena_.data() + backend_.layout().inputs, inputs_.data(), inputs_.size());
    run(GraphKind::kDecoder, f.width);
    if (all_logits == nullptr) return;
    const auto row = static_cast<size_t>(m_.vocab_size);
    if (f.width == 1) {
      memory_.copy(all_logits, address(0), row * sizeof(float));
    } else if (f.n == m_.block_size) {
      project(all_logits);
    } else {
      std::vector<float> block(static_cast<size_t>(m_.block_size) * row);
      project(block.data());
      std::memcpy(all_logits, block.data(), static_cast<size_t>(f.n) * row * sizeof(float));
    }
  }

  void append(const Forward& f, int32_t length) override {
    for (size_t i = 1; i < stored_.size(); ++i) {
      append_columns(memory_, m_, stored_[i], address(i), sources_[i], f.width, f.n, length);
    }
  }

  void fuse(const Forward& f, int32_t /*length*/) override {
    run(GraphKind::kFusion, f.width);  // past_length and num_tokens still hold what the forward read
    current_ = 1 - current_;
  }

  void reset() override {
    memory_.zero(arena_.data(), backend_.layout().total_bytes);
    memory_.finish();
    current_ = 0;
  }

 private:
  using Place = Layout::Place;

  [[nodiscard]] uint8_t* address(size_t i) const override { return address(places_[i]); }
  [[nodiscard]] uint8_t* address(const Place& place) const {
    const int set = place.set == Layout::Set::kCurrent ? current_ : place.set == Layout::Set::kOther ? 1 - current_ : 0;
    return arena_.data() + place.offset + static_cast<uint64_t>(set) * backend_.layout().set_bytes;
  }
  [[nodiscard]] uint8_t* shared(const std::string& name) const {
    return arena_.data() + backend_.layout().places.at(name).offset;
  }
  // In inputs_.
  [[nodiscard]] int32_t* input(const std::string& name) {
    const Layout& layout = backend_.layout();
    return reinterpret_cast<int32_t*>(inputs_.data() + layout.places.at(name).offset - layout.inputs);
  }

  // One binding for each graph and set of state.
  void run(GraphKind kind, int32_t width) {
    const auto key = std::make_pair(kind, width * 2 + current_);
    auto it = bound_.find(key);
    if (it == bound_.end()) {
      const GraphSpec& spec = m_.graph(kind, width);
      ort::Session* session = backend_.session(spec);
      Bound bound{session, backend_.new_binding(session)};
      const auto& places = backend_.layout().places;
      for (const TensorSpec& t : spec.inputs) backend_.bind(bound.binding.get(), t, true, address(places.at(t.name)));
      for (const TensorSpec& t : spec.outputs) backend_.bind(bound.binding.get(), t, false, address(places.at(t.name)));
      it = bound_.emplace(key, std::move(bound)).first;
    }
    backend_.run(it->second.session, it->second.binding.get());
  }

  // Logits of every row of hidden_states, [1, B, hidden] -> (B, vocab_size); rows behind the last forward's are stale.
  void project(float* logits) {
    const GraphSpec& spec = m_.graph(GraphKind::kLmHead, m_.block_size);
    ort::Session* session = backend_.session(spec);
    const Owner<ort::IoBinding> binding = backend_.new_binding(session);
    backend_.bind(binding.get(), spec.inputs[0], true, shared("hidden_states"));
    backend_.bind(binding.get(), spec.outputs[0], false, logits, /*on_host=*/true);
    backend_.run(session, binding.get());
  }

  OrtBackend& backend_;
  const Manifest& m_;
  Arena arena_;
  std::vector<uint8_t> inputs_;    // on the host, as in the arena:
  int32_t* input_ids_;             // [1, B]
  int32_t* position_ids_;          // [1]
  int32_t* past_length_;           // [1]
  int32_t* num_tokens_;            // [1]
  int current_ = 0;                // the set of state that is live
  std::vector<Place> places_;      // of stored_
  std::vector<uint8_t*> sources_;  // of stored_: what a forward gives a tensor of the cache
  std::map<std::pair<GraphKind, int32_t>, Bound> bound_;
};

std::unique_ptr<Executor> OrtBackend::create_executor() { return std::make_unique<OrtExecutor>(*this); }

void OrtBackend::warm_up() {
  const std::unique_ptr<Executor> executor = create_executor();
  const Forward step = {1, 1, /*fuses=*/true, manifest_.mem_size};
  const int32_t id = 0;
  executor->forward(step, &id, 0, manifest_.capacity, nullptr);
  executor->fuse(step, manifest_.capacity);
  executor->finish();
}

// --- batches ---------------------------------------------------------------------------------------------------------

// A row of a batch, as a state; its tokens are read by the batch.
class OrtRow final : public OrtSequence {
 public:
  // addresses: of stored().
  OrtRow(const OrtBackend& backend, std::vector<uint8_t*> addresses)
      : OrtSequence(backend), addresses_(std::move(addresses)) {}

  void forward(const Forward& /*f*/, const int32_t* /*ids*/, int64_t /*position*/, int32_t /*length*/,
               float* /*all_logits*/) override {
    refuse();
  }
  void append(const Forward& /*f*/, int32_t /*length*/) override { refuse(); }
  void fuse(const Forward& /*f*/, int32_t /*length*/) override { refuse(); }
  void reset() override {
    for (size_t i = 0; i < stored_.size(); ++i) memory_.zero(addresses_[i], stored_[i].nbytes());
    memory_.finish();
  }

  [[nodiscard]] uint8_t* address(size_t i) const override { return addresses_[i]; }

 private:
  [[noreturn]] static void refuse() { fail(LOCOCO_ERROR_INTERNAL, "a row of a batch was run alone"); }

  std::vector<uint8_t*> addresses_;
};

class OrtBatch final : public BatchExecutor {
 public:
  explicit OrtBatch(OrtBackend& backend)
      : backend_(backend),
        m_(backend.manifest()),
        memory_(backend.memory()),
        stored_(backend.stored()),
        arena_(memory_, backend.batch_layout().total_bytes),
        inputs_(backend.batch_layout().inputs_bytes),
        input_ids_(input("input_ids")),
        position_ids_(input("position_ids")),
        past_length_(input("past_length")),
        logits_(place("logits")),
        decoder_(bound(*m_.batch_decoder, 0)),
        fusions_(static_cast<size_t>(m_.max_batch())) {
    for (int32_t row = 0; row < m_.max_batch(); ++row) {
      std::vector<uint8_t*> addresses;
      for (const TensorSpec& t : stored_) {
        uint8_t* rows = is_cache(t) ? place(t.name) : arena_.data() + backend.batch_layout().logits;
        addresses.push_back(rows + offset(t, row));
      }
      rows_.emplace_back(backend, std::move(addresses));
    }
    for (const TensorSpec& t : stored_) {
      if (!is_cache(t)) continue;
      const uint64_t column = t.nbytes() / static_cast<uint64_t>(m_.capacity);  // of all heads
      columns_.push_back({place(counterpart(t, "new_key_values", "scores")), is_score(t) ? t.nbytes() + column : column,
                          place(counterpart(t, "present", "present_scores"))});
    }
  }

  void forward(const std::vector<Step>& steps) override {
    const auto rows = static_cast<size_t>(m_.max_batch());
    std::fill_n(input_ids_, rows, 0);
    std::fill_n(position_ids_, rows, 0);
    std::fill_n(past_length_, rows, 0);  // a row that rests sees its own token alone
    for (const Step& s : steps) {
      input_ids_[s.row] = s.id;
      position_ids_[s.row] = static_cast<int32_t>(s.position);
      past_length_[s.row] = s.length;
    }
    memory_.copy(arena_.data(), inputs_.data(), inputs_.size());
    backend_.run(decoder_.session, decoder_.binding.get());
  }

  void append(const Step& s) override {
    const OrtRow& row = rows_[static_cast<size_t>(s.row)];
    for (size_t i = 1; i < stored_.size(); ++i) {
      const Columns& c = columns_[i - 1];
      append_columns(memory_, m_, stored_[i], row.address(i), c.source + static_cast<uint64_t>(s.row) * c.row_bytes, 1,
                     1, s.length);
    }
    take_logits(s);
  }

  void fuse(const Step& s) override {
    Bound& fusion = fusions_[static_cast<size_t>(s.row)];
    if (fusion.session == nullptr) fusion = bound(m_.graph(GraphKind::kFusion, 1), s.row);
    backend_.run(fusion.session, fusion.binding.get());
    const OrtRow& row = rows_[static_cast<size_t>(s.row)];
    for (size_t i = 1; i < stored_.size(); ++i) {
      memory_.copy(row.address(i), columns_[i - 1].fused, stored_[i].nbytes());
    }
    take_logits(s);
  }

  Executor& row(int32_t row) override { return rows_[static_cast<size_t>(row)]; }

 private:
  struct Columns {          // of a tensor of the cache
    const uint8_t* source;  // what a forward gives
    uint64_t row_bytes;     // of source
    const uint8_t* fused;   // what a fusion gives one row
  };

  [[nodiscard]] uint8_t* place(const std::string& name) const {
    return arena_.data() + backend_.batch_layout().places.at(name);
  }
  // In inputs_.
  [[nodiscard]] int32_t* input(const std::string& name) {
    return reinterpret_cast<int32_t*>(inputs_.data() + backend_.batch_layout().places.at(name));
  }
  // Of a row, from the tensor's first; t is what one sequence has.
  static uint64_t offset(const TensorSpec& t, int32_t row) { return static_cast<uint64_t>(row) * t.nbytes(); }

  // Inputs from `row` on, outputs at their beginning.
  [[nodiscard]] Bound bound(const GraphSpec& spec, int32_t row) const {
    ort::Session* session = backend_.session(spec);
    Bound bound{session, backend_.new_binding(session)};
    for (const TensorSpec& t : spec.inputs) {
      backend_.bind(bound.binding.get(), t, true, place(t.name) + offset(t, row));
    }
    for (const TensorSpec& t : spec.outputs) backend_.bind(bound.binding.get(), t, false, place(t.name));
    return bound;
  }

  // The last thing that a row does: its errors come out here.
  void take_logits(const Step& s) {
    memory_.copy(rows_[static_cast<size_t>(s.row)].address(0), logits_ + offset(stored_[0], s.row),
                 stored_[0].nbytes());
    memory_.finish();
  }

  OrtBackend& backend_;
  const Manifest& m_;
  const Memory& memory_;
  const std::vector<TensorSpec>& stored_;
  Arena arena_;                  // zero: rows that rest are computed too
  std::vector<uint8_t> inputs_;  // on the host, as at the arena's beginning:
  int32_t* input_ids_;           // [N, 1]
  int32_t* position_ids_;        // [N]
  int32_t* past_length_;         // [N]
  const uint8_t* logits_;        // [N, vocab_size] float32
  Bound decoder_;
  std::vector<Bound> fusions_;  // of the rows, made when first needed
  std::deque<OrtRow> rows_;
  std::vector<Columns> columns_;  // of stored_[1...]
};

std::unique_ptr<BatchExecutor> OrtBackend::create_batch() { return std::make_unique<OrtBatch>(*this); }

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const Manifest& manifest, const BackendOptions& options,
                                          std::optional<int32_t> cuda_device) {
  std::optional<CudaDevice> device;  // asked for first: without a driver, ONNX Runtime's provider does not even load
  if (cuda_device) device = query_cuda_device(*cuda_device);
  auto backend = std::make_unique<OrtBackend>(manifest, options, device);
  if (device) backend->warm_up();
  return backend;
}

}  // namespace lococo
