// backend.h - what a session asks of an inference engine. A session decides what to run and when (session.cc); a
// backend owns the buffers and runs the graphs, wherever they live.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cadence.h"
#include "manifest.h"

namespace lococo {

// The buffers of one sequence. L below is the number of live slots before the forward. Methods throw Error.
class Executor {
 public:
  Executor() = default;
  virtual ~Executor() = default;
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Reads ids[0..f.n) at position on, with `length` live slots. Leaves the new slots, their scores and the logits in
  // the executor; the state is not touched. all_logits: NULL or (f.n, vocab_size).
  virtual void forward(const Forward& f, const int32_t* ids, int64_t position, int32_t length, float* all_logits) = 0;
  // After a forward: either its slots join the state, columns length..length+n-1, ...
  virtual void append(const Forward& f, int32_t length) = 0;
  // ... or state and slots are fused into mem_size slots, the other columns zero.
  virtual void fuse(const Forward& f, int32_t length) = 0;

  // Waits for what was started; errors of the device come out here at the latest.
  virtual void finish() {}

  // Greedy decoding of a whole window in one go: window() = capacity - mem_size + 1 tokens from mem_size live slots
  // on, each chosen and then read, the last one followed by a fusion. 0: not offered.
  [[nodiscard]] virtual int32_t window() const { return 0; }
  // ids: (window()). The state is the old one until end_window, which keeps the new one or forgets it. Returns the
  // seconds that the device waited since the window before, if that was kept and nothing came between.
  virtual double run_window(int64_t /*position*/, int32_t* /*ids*/) { return 0.0; }
  virtual void end_window(bool /*keep*/) {}

  // (vocab_size), in host memory, valid until the next call.
  virtual const float* logits() = 0;
  // Zero state, zero logits.
  virtual void reset() = 0;
  // Manifest::state but position and past_length, in its order, tight.
  virtual void read_state(uint8_t* bytes) = 0;
  virtual void write_state(const uint8_t* bytes) = 0;
  // The state of an executor of the same backend.
  virtual void copy_from(Executor& other) = 0;
};

// The buffers of a batch: Manifest::max_batch() rows, each the state of one sequence or idle. Methods throw Error; then
// the state and the logits of every row that the call was about are as they were.
class BatchExecutor {
 public:
  struct Step {  // one token of one row
    int32_t row;
    int32_t id;
    int64_t position;
    int32_t length;  // live slots before
  };

  BatchExecutor() = default;
  virtual ~BatchExecutor() = default;
  BatchExecutor(const BatchExecutor&) = delete;
  BatchExecutor& operator=(const BatchExecutor&) = delete;

  // Reads one token in each of these rows, which differ. States and logits stay; what came out waits for append or
  // fuse.
  virtual void forward(const std::vector<Step>& steps) = 0;
  // The row takes its new slot, or is fused with it into mem_size slots, and takes its new logits.
  virtual void append(const Step& step) = 0;
  virtual void fuse(const Step& step) = 0;
  // The row as the state of a sequence: logits, reset, read_state, write_state, and copy_from in both directions.
  virtual Executor& row(int32_t row) = 0;
};

// An opened bundle. Used from many threads at once.
class Backend {
 public:
  Backend() = default;
  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  virtual std::unique_ptr<Executor> create_executor() = 0;
  // What an executor allocates.
  [[nodiscard]] virtual uint64_t executor_bytes() const = 0;
  // Of the forwards that it can run, ascending, from 1 to block_size.
  [[nodiscard]] virtual const std::vector<int32_t>& widths() const = 0;
  // Whether a forward can give the logits of every token.
  [[nodiscard]] virtual bool has_all_logits() const { return true; }

  // NULL: it cannot run a batched graph, so a batch steps its sequences one by one, in executors of their own.
  virtual std::unique_ptr<BatchExecutor> create_batch() { return nullptr; }
  // What a batch allocates; 0 where the bundle has no batched graph or the backend cannot run one.
  [[nodiscard]] virtual uint64_t batch_bytes() const { return 0; }
};

struct BackendOptions {
  std::string library;       // path of the engine's library, "" for the default
  int32_t num_threads = 0;   // 0: one per physical core
  bool skip_hashes = false;  // check sizes only
};

// manifest outlives the backend.
// cuda_device: none for the CPU.
std::unique_ptr<Backend> open_onnxruntime(const Manifest& manifest, const BackendOptions& options,
                                          std::optional<int32_t> cuda_device);
std::unique_ptr<Backend> open_tensorrt(const Manifest& manifest, const BackendOptions& options, int32_t device_index);

}  // namespace lococo
