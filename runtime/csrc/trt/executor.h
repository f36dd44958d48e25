// executor.h - in liblococo_trt: one bundle on one device, and the sequences that it runs.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "module.h"
#include "trt/check.h"
#include "trt/kernels.h"
#include "trt/nvinfer.h"

namespace lococo::trt {

using GraphKey = std::pair<lococo_module_kind, int32_t>;  // and tokens

// Engines and weights, shared by executors of any thread. The device must be current in every call.
class Backend {
 public:
  explicit Backend(const lococo_module_bundle& bundle);

  [[nodiscard]] int32_t device() const { return b_.device; }
  // What an executor allocates on the device and in pinned memory.
  [[nodiscard]] uint64_t executor_bytes() const;
  [[nodiscard]] const lococo_module_bundle& bundle() const { return b_; }
  [[nodiscard]] uint64_t workspace_bytes() const { return workspace_bytes_; }
  [[nodiscard]] std::vector<int32_t> widths() const;
  [[nodiscard]] int32_t window() const { return b_.capacity - b_.mem_size + 1; }

  // Contexts of all graphs, every tensor bound but the logits of lm_head.
  [[nodiscard]] std::map<GraphKey, Context> create_contexts(uint8_t* arena, void* workspace);

 private:
  struct Tensor {
    std::string name;
    bool is_weight;
    uint64_t offset;
  };
  struct Loaded {
    Engine engine;
    std::vector<Tensor> tensors;
  };

  lococo_module_bundle b_;  // its pointers are not used after the constructor
  DeviceMemory weights_;
  std::unique_ptr<nvinfer1::IRuntime, Deleter> runtime_;
  std::map<GraphKey, Loaded> engines_;
  uint64_t workspace_bytes_ = 0;  // of the graph that needs most
  std::mutex mutex_;              // of making contexts
};

// One sequence: one stream, one arena, one workspace for all graphs, which run one after another.
//
// Every address is fixed from the start, so that whatever is repeated is captured once as a CUDA graph: a forward with
// the append or the fusion that follows it, and a window of greedy decoding. A fusion cannot write the state that it
// reads; its result is copied back, which takes a few microseconds and spares a second set of captured graphs.
class Executor {
 public:
  explicit Executor(Backend& backend);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  void forward(const lococo_module_forward& f, float* all_logits);
  void finish();
  double run_window(int64_t position, int32_t* ids);
  void end_window(bool keep);
  const float* logits();
  void reset();
  void read_state(uint8_t* bytes);
  void write_state(const uint8_t* bytes);
  void copy_state(Executor& from);

  [[nodiscard]] int32_t device() const { return backend_.device(); }

 private:
  struct Slot {  // of pinned memory, an image of the inputs
    PinnedMemory memory;
    Event copied;
  };
  struct Span {  // of work on the stream
    Event begin, end;
  };
  struct Run {  // bytes of the state, contiguous on the device and in the file
    uint64_t device;
    uint64_t file;
    uint64_t nbytes;
  };

  template <typename T = uint8_t>
  [[nodiscard]] T* at(uint64_t offset) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(arena_.get()) + offset);
  }
  [[nodiscard]] Cursor cursor() const;

  void warm_up();
  void send_inputs(const int32_t* ids, int32_t n, int64_t position, int32_t length);
  void write_inputs(const PinnedMemory& memory, const int32_t* ids, int32_t n, int64_t position, int32_t length) const;
  void send(const PinnedMemory& inputs);
  void await_tokens();
  void settle();
  void enqueue(lococo_module_kind kind, int32_t tokens);
  void append(int32_t width);
  void choose();
  void copy(uint64_t to, uint64_t from, uint64_t nbytes);
  void project(const lococo_module_forward& f, float* all_logits);
  // Captures body on its first call, launches the graph.
  template <typename F>
  void launch(int32_t key, F&& body);
  template <typename F>
  GraphExec capture(const std::string& name, F&& body);

  Backend& backend_;
  const lococo_module_bundle& b_;
  const lococo_module_layout& l_;
  const bool use_graphs_;
  Stream stream_;
  DeviceMemory arena_;
  DeviceMemory workspace_;
  std::array<Slot, 2> slots_;  // the host fills one while the device may still read the other
  size_t slot_ = 0;
  PinnedMemory logits_;          // (vocab_size)
  PinnedMemory ring_;            // (window)
  PinnedMemory window_inputs_;   // an image of the inputs
  std::array<Span, 2> windows_;  // the last one and the one before
  size_t window_ = 0;
  bool keeps_ = false;  // the state is what the last window's fusion wrote
  std::vector<Run> state_;
  std::map<GraphKey, Context> contexts_;
  std::map<int32_t, GraphExec> graphs_;
};

}  // namespace lococo::trt
