// session.h - one sequence: what to run next, where it stands, and its state as bytes. No backend is named here.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "cadence.h"
#include "lococo.h"
#include "manifest.h"
#include "sampler.h"

namespace lococo {

struct Model {
  Manifest manifest;
  std::unique_ptr<Backend> backend;

  [[nodiscard]] uint64_t session_bytes() const;
};

class Batch;

class Session {
 public:
  explicit Session(std::shared_ptr<Model> model);

  void reset();
  // Precondition: both of the same model.
  void copy_from(Session& other);

  // ids: (n). all_logits: NULL or (n, vocab_size).
  void prefill(const int32_t* ids, size_t n, float* all_logits);
  void step(int32_t id);
  const float* logits();  // (vocab_size)
  int32_t sample(const lococo_sampling_params& params);
  void distribution(const lococo_sampling_params& params, float* probabilities);                // (vocab_size)
  void logprobs(int32_t id, int32_t n, float* logprob, int32_t* top_ids, float* top_logprobs);  // (n)
  // Returns the number of tokens generated.
  int32_t generate(const lococo_sampling_params& params, int32_t max_tokens, lococo_token_fn on_token, void* user);

  [[nodiscard]] const std::shared_ptr<Model>& model() const { return model_; }
  [[nodiscard]] int64_t position() const { return position_; }
  [[nodiscard]] int32_t live_slots() const { return length_; }
  [[nodiscard]] int64_t steps() const { return steps_; }
  [[nodiscard]] int64_t windows() const { return windows_; }
  [[nodiscard]] double idle_seconds() const { return idle_seconds_; }
  [[nodiscard]] int64_t blocks() const { return blocks_; }
  [[nodiscard]] int64_t fusions() const { return fusions_; }

  [[nodiscard]] size_t state_size() const;
  void state_get(uint8_t* buffer);
  void state_set(const uint8_t* buffer, size_t size);
  void save(const std::string& path);
  void load(const std::string& path);

  // For a batch: moves the state to a row of it (NULL: keeps it), and back; what the next forward is; that it has read
  // `id`.
  void enter_batch(Batch& batch, int32_t row, Executor* state);
  void leave_batch();
  [[nodiscard]] Batch* batch() const { return batch_; }  // NULL: in none
  [[nodiscard]] int32_t row() const { return row_; }
  void check_readable(const int32_t* ids, size_t n) const;
  [[noreturn]] void fail_cancelled() const;
  [[nodiscard]] Forward next_step() const { return cadence_.next(length_, 1); }
  void stepped(const Forward& f, int32_t id);
  // The same in an executor of its own: `id` is being read until finish_step. Dead if either fails.
  void start_step(int32_t id);
  void finish_step(int32_t id);

  std::atomic<bool> busy{false};       // a thread is inside
  std::atomic<bool> cancelled{false};  // no further forward
  bool dead = false;                   // a backend error left the state unknown

 private:
  void check_not_empty() const;
  void check_alone() const;
  // Reads the first tokens of ids (n), and appends or fuses; may return before the device is done.
  Forward start_forward(const int32_t* ids, size_t n, float* all_logits);
  void advance(const Forward& f);
  void read_tokens(const int32_t* ids, size_t n, float* all_logits, bool cancellable = true);
  // Chooses and reads a window of tokens; `accept` gets each and returns false to stop before it is read.
  template <typename F>
  bool read_window(F&& accept);
  void adopt(const uint8_t* payload);
  void clear_counters() {
    steps_ = blocks_ = fusions_ = windows_ = 0;
    idle_seconds_ = 0.0;
  }

  std::shared_ptr<Model> model_;
  const Manifest& m_;
  Cadence cadence_;
  std::unique_ptr<Executor> own_;
  Executor* executor_;  // own_, or the row of a batch
  Batch* batch_ = nullptr;
  int32_t row_ = 0;
  Sampler sampler_;
  TokenCounts token_counts_;     // state, as K and V are
  std::vector<int32_t> window_;  // tokens of a window, empty if the backend offers none
  int64_t position_ = 0;         // P: tokens read
  int32_t length_ = 0;           // L: live slots
  int64_t steps_ = 0;
  int64_t windows_ = 0;
  double idle_seconds_ = 0.0;  // of the device, between windows
  int64_t blocks_ = 0;
  int64_t fusions_ = 0;
};

}  // namespace lococo
