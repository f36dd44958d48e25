#include "trt/executor.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>

#include "error.h"

namespace lococo::trt {
namespace {

// Keys of the captured graphs.
constexpr int32_t kWindowKey = -1;
constexpr int32_t kNoToken = std::numeric_limits<int32_t>::min();  // not chosen yet
int32_t forward_key(int32_t width, bool fuses) { return 2 * width + (fuses ? 1 : 0); }

std::string name_of(int32_t key) {
  return key == kWindowKey ? "window" : format("decoder_%d with %s", key / 2, key % 2 != 0 ? "fusion" : "append");
}

// $LOCOCO_TRT_GRAPHS=0 launches kernels one by one, to find out what fails inside a captured graph.
bool graphs_wanted() {
  const char* value = std::getenv("LOCOCO_TRT_GRAPHS");
  return value == nullptr || std::strcmp(value, "0") != 0;
}

uint64_t pinned_bytes(const lococo_module_bundle& b, int32_t window) {
  return 3 * b.layout.inputs_bytes + b.layout.logits_bytes + static_cast<uint64_t>(window) * sizeof(int32_t);
}

}  // namespace

// --- backend ---------------------------------------------------------------------------------------------------------

Backend::Backend(const lococo_module_bundle& bundle) : b_(bundle) {
  require_kernels();
  uint64_t plans = 0;
  uint64_t workspace = 0;
  for (int32_t i = 0; i < b_.num_graphs; ++i) {
    plans += b_.graphs[i].plan_bytes;
    workspace = std::max(workspace, b_.graphs[i].workspace_bytes);
  }
  require_memory(plans + b_.weights_bytes + workspace + b_.layout.arena_bytes, "the model with one session");
  if (b_.weights_bytes > 0) {
    weights_ = allocate_device(b_.weights_bytes, "the weights");
    check(cudaMemcpy(weights_.get(), b_.weights, b_.weights_bytes, cudaMemcpyHostToDevice), "copy the weights");
  }
  runtime_ = create_runtime(b_.host_code_allowed != 0);
  for (int32_t i = 0; i < b_.num_graphs; ++i) {
    const lococo_module_graph& graph = b_.graphs[i];
    Loaded loaded{Engine(*runtime_, graph), {}};
    for (int32_t j = 0; j < graph.num_tensors; ++j) {
      const lococo_module_tensor& t = graph.tensors[j];
      loaded.tensors.push_back({t.name, t.is_weight != 0, t.offset});
    }
    workspace_bytes_ = std::max(workspace_bytes_, loaded.engine.workspace_bytes());
    engines_.emplace(GraphKey(graph.kind, graph.tokens), std::move(loaded));
  }
  b_.graphs = nullptr;
  b_.weights = nullptr;
}

uint64_t Backend::executor_bytes() const {
  return b_.layout.arena_bytes + workspace_bytes_ + pinned_bytes(b_, window());
}

std::vector<int32_t> Backend::widths() const {
  std::vector<int32_t> widths;
  for (const auto& [key, loaded] : engines_) {
    const auto& [kind, tokens] = key;
    if (kind == LOCOCO_MODULE_DECODER && engines_.count({LOCOCO_MODULE_FUSION, tokens}) > 0) widths.push_back(tokens);
  }
  return widths;
}

std::map<GraphKey, Context> Backend::create_contexts(uint8_t* arena, void* workspace) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::map<GraphKey, Context> contexts;
  for (const auto& [key, loaded] : engines_) {
    Context context = loaded.engine.create_context();
    context.set_workspace(workspace, workspace_bytes_);
    for (const Tensor& t : loaded.tensors) {
      if (t.offset == LOCOCO_MODULE_NO_OFFSET) continue;
      context.bind(t.name.c_str(), (t.is_weight ? static_cast<uint8_t*>(weights_.get()) : arena) + t.offset);
    }
    contexts.emplace(key, std::move(context));
  }
  return contexts;
}

// --- executor --------------------------------------------------------------------------------------------------------

Executor::Executor(Backend& backend)
    : backend_(backend), b_(backend.bundle()), l_(b_.layout), use_graphs_(graphs_wanted()), stream_(create_stream()) {
  require_memory(l_.arena_bytes + backend.workspace_bytes(), "a session");
  arena_ = allocate_device(l_.arena_bytes, "a session");
  workspace_ = allocate_device(backend.workspace_bytes(), "a session's workspace");
  const auto image = [&] {
    PinnedMemory memory = allocate_pinned(l_.inputs_bytes);
    std::memset(memory.get(), 0, l_.inputs_bytes);
    return memory;
  };
  for (Slot& slot : slots_) slot = {image(), create_event()};
  window_inputs_ = image();
  logits_ = allocate_pinned(l_.logits_bytes);
  ring_ = allocate_pinned(static_cast<uint64_t>(backend.window()) * sizeof(int32_t));
  for (Span& span : windows_) span = {create_event(true), create_event(true)};

  // The state file is tight, the device's tensors are aligned: neighbours without a gap become one run.
  uint64_t file = 0;
  const auto add = [&](uint64_t device, uint64_t nbytes) {
    if (!state_.empty() && state_.back().device + state_.back().nbytes == device) {
      state_.back().nbytes += nbytes;
    } else {
      state_.push_back({device, file, nbytes});
    }
    file += nbytes;
  };
  const auto slots = static_cast<uint64_t>(b_.num_kv_heads) * static_cast<uint64_t>(b_.capacity);  // [H_kv, C]
  add(l_.logits, l_.logits_bytes);
  for (uint64_t i = 0; i < 2 * static_cast<uint64_t>(b_.num_layers); ++i) {
    add(l_.cache + i * l_.kv_stride,
        slots * static_cast<uint64_t>(b_.head_dim) * static_cast<uint64_t>(b_.element_bytes));
  }
  if (l_.scores_bytes > 0) {
    for (uint64_t i = 0; i < static_cast<uint64_t>(b_.num_layers); ++i) {
      add(l_.past_scores + i * l_.past_stride, slots * sizeof(float));
    }
  }
  contexts_ = backend.create_contexts(at(0), workspace_.get());
  warm_up();
  reset();
}

Executor::~Executor() {
  (void)cudaStreamSynchronize(stream_.get());  // nothing is freed under a running kernel
}

// Everything runs once before it is captured: TensorRT and CUDA load code and allocate at a first run, which a capture
// does not allow. The cache is as full as it can be, so that every index of a fusion is in bounds.
void Executor::warm_up() {
  check(cudaMemsetAsync(at(0), 0, l_.arena_bytes, stream_.get()), "clear the session");
  for (const int32_t width : backend_.widths()) {
    send_inputs(nullptr, width, 0, b_.capacity);
    enqueue(LOCOCO_MODULE_DECODER, width);
    enqueue(LOCOCO_MODULE_FUSION, width);
  }
  send_inputs(nullptr, 1, 0, 0);
  append(1);
  choose();
  finish();
}

Cursor Executor::cursor() const {
  return {at<int32_t>(l_.position), at<int32_t>(l_.past_length), at<int32_t>(l_.num_tokens), at<int32_t>(l_.input_ids)};
}

// ids: (n), or NULL for zeros.
void Executor::send_inputs(const int32_t* ids, int32_t n, int64_t position, int32_t length) {
  slot_ = 1 - slot_;
  Slot& slot = slots_[slot_];
  check(cudaEventSynchronize(slot.copied.get()), "wait for the device");
  write_inputs(slot.memory, ids, n, position, length);
  send(slot.memory);
  check(cudaEventRecord(slot.copied.get(), stream_.get()), "record an event");
}

void Executor::write_inputs(const PinnedMemory& memory, const int32_t* ids, int32_t n, int64_t position,
                            int32_t length) const {
  auto* image = static_cast<uint8_t*>(memory.get());
  const auto word = [&](uint64_t offset) { return reinterpret_cast<int32_t*>(image + (offset - l_.inputs)); };
  *word(l_.position) = static_cast<int32_t>(position);
  *word(l_.past_length) = length;
  *word(l_.num_tokens) = n;
  const auto block = static_cast<size_t>(b_.block_size);
  const size_t given = ids != nullptr ? static_cast<size_t>(n) : 0;
  std::copy_n(ids, given, word(l_.input_ids));
  std::fill_n(word(l_.input_ids) + given, block - given, 0);
}

void Executor::send(const PinnedMemory& inputs) {
  check(cudaMemcpyAsync(at(l_.inputs), inputs.get(), l_.inputs_bytes, cudaMemcpyHostToDevice, stream_.get()),
        "send the tokens");
}

void Executor::enqueue(lococo_module_kind kind, int32_t tokens) { contexts_.at({kind, tokens}).enqueue(stream_.get()); }

void Executor::copy(uint64_t to, uint64_t from, uint64_t nbytes) {
  check(cudaMemcpyAsync(at(to), at(from), nbytes, cudaMemcpyDeviceToDevice, stream_.get()), "copy on the device");
}

void Executor::append(int32_t width) {
  const Columns columns = {at(l_.cache),
                           at(l_.new_kv),
                           l_.kv_stride,
                           l_.new_kv_stride,
                           2 * b_.num_layers,
                           b_.num_kv_heads,
                           b_.capacity,
                           width,
                           b_.head_dim * b_.element_bytes};
  check(append_columns(columns, cursor(), stream_.get()), "append to the state");
  if (l_.scores_bytes == 0) return;
  const Scores scores = {at<float>(l_.past_scores),
                         at<float>(l_.scores),
                         l_.past_stride / sizeof(float),
                         l_.scores_stride / sizeof(float),
                         b_.num_layers,
                         b_.num_kv_heads,
                         b_.capacity,
                         width};
  check(append_scores(scores, cursor(), stream_.get()), "append to the scores");
}

void Executor::choose() {
  check(choose_token(at<float>(l_.logits), b_.vocab_size, at<Chooser>(l_.chooser), at<int32_t>(l_.ring), cursor(),
                     stream_.get()),
        "choose a token");
}

template <typename F>
void Executor::launch(int32_t key, F&& body) {
  if (!use_graphs_) return body();
  auto it = graphs_.find(key);
  if (it == graphs_.end()) it = graphs_.emplace(key, capture(name_of(key), body)).first;
  check(cudaGraphLaunch(it->second.get(), stream_.get()), "launch a CUDA graph");
}

template <typename F>
GraphExec Executor::capture(const std::string& name, F&& body) {
  const auto start = std::chrono::steady_clock::now();
  // Of this thread only: what sessions in other threads do meanwhile is no part of it.
  check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "begin a capture");
  cudaGraph_t raw = nullptr;
  try {
    body();
  } catch (const Error& e) {
    (void)cudaStreamEndCapture(stream_.get(), &raw);
    const Graph dropped(raw);
    (void)cudaGetLastError();
    fail(e.status(), "%s: while captured as a CUDA graph: %s", name.c_str(), e.what());
  }
  check(cudaStreamEndCapture(stream_.get(), &raw), "end a capture");
  const Graph graph(raw);
  size_t num_nodes = 0;
  check(cudaGraphGetNodes(raw, nullptr, &num_nodes), "count a graph's nodes");
  cudaGraphExec_t exec = nullptr;
  check(cudaGraphInstantiate(&exec, raw, 0), "instantiate a CUDA graph");
  GraphExec owner(exec);
  const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
  log_line(LOCOCO_LOG_INFO, format("captured %s: %zu nodes in %.0f ms", name.c_str(), num_nodes, elapsed.count()));
  return owner;
}

void Executor::forward(const lococo_module_forward& f, float* all_logits) {
  const bool fuses = f.fuses != 0;
  settle();
  send_inputs(f.ids, f.n, f.position, f.length);
  launch(forward_key(f.width, fuses), [&] {
    enqueue(LOCOCO_MODULE_DECODER, f.width);
    if (fuses) {
      enqueue(LOCOCO_MODULE_FUSION, f.width);
      copy(l_.cache, l_.fused, l_.cache_bytes);
    } else {
      append(f.width);
    }
  });
  if (all_logits != nullptr) project(f, all_logits);
}

// Logits of every token of the forward, (n, vocab_size).
void Executor::project(const lococo_module_forward& f, float* all_logits) {
  if (f.width == 1) {
    std::memcpy(all_logits, logits(), l_.logits_bytes);
    return;
  }
  const uint64_t nbytes = static_cast<uint64_t>(b_.block_size) * l_.logits_bytes;
  require_memory(nbytes, "the logits of a block");
  const DeviceMemory block = allocate_device(nbytes, "the logits of a block");
  contexts_.at({LOCOCO_MODULE_LM_HEAD, b_.block_size}).bind("logits", block.get());
  enqueue(LOCOCO_MODULE_LM_HEAD, b_.block_size);  // rows behind the last token are stale
  check(cudaMemcpyAsync(all_logits, block.get(), static_cast<uint64_t>(f.n) * l_.logits_bytes, cudaMemcpyDeviceToHost,
                        stream_.get()),
        "fetch the logits");
  finish();
}

void Executor::finish() { check(cudaStreamSynchronize(stream_.get()), "run the graphs"); }

// A window starts at M live slots, appends behind them, and its fusion writes elsewhere. So the state stays as it is
// until the next window, which begins by keeping what the fusion wrote; only logits and accumulated scores have to be
// saved to go back. The tokens are fetched before the last of them is read and the slots are fused: in that time the
// host looks at them and launches the next window, for which the device then need not wait.
double Executor::run_window(int64_t position, int32_t* ids) {
  const int32_t window = backend_.window();
  const bool follows = keeps_;
  if (!follows) copy(l_.fused, l_.cache, l_.cache_bytes);
  keeps_ = false;
  write_inputs(window_inputs_, nullptr, 1, position, b_.mem_size);
  auto* ring = static_cast<int32_t*>(ring_.get());
  std::fill_n(ring, window, kNoToken);
  const Span& before = windows_[window_];
  window_ = 1 - window_;
  const Span& span = windows_[window_];
  check(cudaEventRecord(span.begin.get(), stream_.get()), "record an event");
  launch(kWindowKey, [&] {
    send(window_inputs_);
    copy(l_.cache, l_.fused, l_.cache_bytes);
    copy(l_.saved_logits, l_.logits, l_.logits_bytes);
    if (l_.scores_bytes > 0) copy(l_.saved_scores, l_.past_scores, l_.scores_bytes);
    for (int32_t i = 0; i < window; ++i) {
      choose();
      if (i + 1 == window) {
        check(cudaMemcpyAsync(ring_.get(), at(l_.ring), static_cast<size_t>(window) * sizeof(int32_t),
                              cudaMemcpyDeviceToHost, stream_.get()),
              "fetch the tokens");
      }
      enqueue(LOCOCO_MODULE_DECODER, 1);
      if (i + 1 < window) append(1);
    }
    enqueue(LOCOCO_MODULE_FUSION, 1);
  });
  check(cudaEventRecord(span.end.get(), stream_.get()), "record an event");
  await_tokens();
  std::memcpy(ids, ring, static_cast<size_t>(window) * sizeof(int32_t));
  if (std::find(ids, ids + window, -1) != ids + window) {
    fail(LOCOCO_ERROR_BACKEND,
         "logits: expected finite numbers, got NaN or infinity within %d tokens of position %lld; the weights are"
         " damaged or overflow this dtype, export with a wider one",
         window, static_cast<long long>(position));
  }
  return follows ? seconds_between(before.end, span.begin) : 0.0;
}

// An event within a graph would say when they are there, but what waits for it and when is not specified well enough.
void Executor::await_tokens() {
  const auto* ring = static_cast<const int32_t*>(ring_.get());
  const auto arrived = [&] {
    return std::none_of(ring, ring + backend_.window(),
                        [](const int32_t& id) { return __atomic_load_n(&id, __ATOMIC_ACQUIRE) == kNoToken; });
  };
  for (uint32_t polls = 1; !arrived(); ++polls) {
    if (polls % 64 == 0) {
      const cudaError_t status = cudaStreamQuery(stream_.get());
      if (status == cudaSuccess) return;  // everything has, then
      if (status != cudaErrorNotReady) check(status, "run the graphs");
      (void)cudaGetLastError();  // that it is not ready is no error
    }
    std::this_thread::yield();
  }
}

void Executor::end_window(bool keep) {
  keeps_ = keep;
  if (keep) return;
  copy(l_.logits, l_.saved_logits, l_.logits_bytes);
  if (l_.scores_bytes > 0) copy(l_.past_scores, l_.saved_scores, l_.scores_bytes);
  finish();
}

// Brings the state where everything but the next window looks for it.
void Executor::settle() {
  if (keeps_) copy(l_.cache, l_.fused, l_.cache_bytes);
  keeps_ = false;
}

const float* Executor::logits() {
  check(cudaMemcpyAsync(logits_.get(), at(l_.logits), l_.logits_bytes, cudaMemcpyDeviceToHost, stream_.get()),
        "fetch the logits");
  finish();
  return static_cast<const float*>(logits_.get());
}

void Executor::reset() {
  keeps_ = false;
  check(cudaMemsetAsync(at(0), 0, l_.arena_bytes, stream_.get()), "clear the session");
  finish();
}

void Executor::read_state(uint8_t* bytes) {
  settle();
  for (const Run& run : state_) {
    check(cudaMemcpyAsync(bytes + run.file, at(run.device), run.nbytes, cudaMemcpyDeviceToHost, stream_.get()),
          "fetch the state");
  }
  finish();
}

void Executor::write_state(const uint8_t* bytes) {
  keeps_ = false;
  for (const Run& run : state_) {
    check(cudaMemcpyAsync(at(run.device), bytes + run.file, run.nbytes, cudaMemcpyHostToDevice, stream_.get()),
          "send the state");
  }
  finish();
}

void Executor::copy_state(Executor& from) {
  keeps_ = false;
  from.settle();
  from.finish();
  check(cudaMemcpyAsync(at(l_.state), from.at(l_.state), l_.state_bytes, cudaMemcpyDeviceToDevice, stream_.get()),
        "copy the state");
  finish();
}

}  // namespace lococo::trt
