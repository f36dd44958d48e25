#include "session.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "error.h"
#include "files.h"
#include "state_file.h"

namespace lococo {
namespace {

constexpr int64_t kMaxPosition = std::numeric_limits<int32_t>::max();  // graphs take positions as int32

// Columns that are not live are zero in a state, whatever a backend leaves there: nothing of an earlier sequence leaks.
void clear_stale_columns(const Manifest& m, uint8_t* payload, int64_t length) {
  for (const TensorSpec& t : m.state) {
    if (t.shape.size() >= 3) {  // (1, H_kv, C) or (1, H_kv, C, d)
      const uint64_t head_bytes = t.nbytes() / static_cast<uint64_t>(m.num_kv_heads);
      const uint64_t live_bytes = head_bytes / static_cast<uint64_t>(m.capacity) * static_cast<uint64_t>(length);
      for (int32_t head = 0; head < m.num_kv_heads; ++head) {
        std::memset(payload + static_cast<uint64_t>(head) * head_bytes + live_bytes, 0, head_bytes - live_bytes);
      }
    }
    payload += t.nbytes();
  }
}

}  // namespace

uint64_t Model::session_bytes() const {
  return sizeof(Session) + backend->executor_bytes() + Sampler::nbytes(manifest.vocab_size) +
         TokenCounts::nbytes(manifest.vocab_size);
}

Session::Session(std::shared_ptr<Model> model)
    : model_(std::move(model)),
      m_(model_->manifest),
      cadence_(m_.mem_size, m_.capacity, model_->backend->widths()),
      own_(model_->backend->create_executor()),
      executor_(own_.get()),
      sampler_(m_.vocab_size),
      token_counts_(m_.vocab_size),
      window_(static_cast<size_t>(executor_->window())) {}

void Session::check_alone() const {
  if (batch_ != nullptr) {
    fail(LOCOCO_ERROR_BUSY, "session: in a batch, which reads its tokens; remove it from the batch first");
  }
}

void Session::enter_batch(Batch& batch, int32_t row, Executor* state) {
  if (state != nullptr) {
    state->copy_from(*own_);
    executor_ = state;
  }
  batch_ = &batch;
  row_ = row;
}

void Session::leave_batch() {
  if (executor_ != own_.get() && !dead) own_->copy_from(*executor_);
  executor_ = own_.get();
  batch_ = nullptr;
}

void Session::reset() {
  check_alone();
  dead = true;
  executor_->reset();
  token_counts_.clear();
  position_ = 0;
  length_ = 0;
  clear_counters();
  dead = false;
}

void Session::copy_from(Session& other) {
  executor_->copy_from(*other.executor_);
  token_counts_ = other.token_counts_;
  position_ = other.position_;
  length_ = other.length_;
  clear_counters();
}

void Session::check_readable(const int32_t* ids, size_t n) const {
  if (n == 0) fail(LOCOCO_ERROR_INVALID_ARGUMENT, "ids: expected at least one token, got none");
  if (n > static_cast<uint64_t>(kMaxPosition - position_)) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT,
         "position: expected at most %lld after the call, got %lld + %zu; reset the session",
         static_cast<long long>(kMaxPosition), static_cast<long long>(position_), n);
  }
  for (size_t i = 0; i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= m_.vocab_size) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT,
           "ids[%zu]: expected a token id from 0 to %d, got %d; is this the bundle's tokenizer?", i, m_.vocab_size - 1,
           ids[i]);
    }
  }
}

void Session::read_tokens(const int32_t* ids, size_t n, float* all_logits, bool cancellable) {
  dead = true;  // until all is well: an exception half-way leaves a state that is neither the old one nor the new one
  const int32_t* const first = ids;
  const int64_t start = position_;
  while (n > 0 && !(cancellable && cancelled.load(std::memory_order_relaxed))) {
    const Forward f = start_forward(ids, n, all_logits);
    advance(f);
    ids += f.n;
    n -= static_cast<size_t>(f.n);
    if (all_logits != nullptr) all_logits += static_cast<size_t>(f.n) * static_cast<size_t>(m_.vocab_size);
  }
  executor_->finish();
  if (ids > first) token_counts_.read(first, static_cast<size_t>(ids - first), start);
  dead = false;
  if (n > 0) fail_cancelled();
}

void Session::fail_cancelled() const {
  fail(LOCOCO_ERROR_CANCELLED, "session: cancelled at position %lld", static_cast<long long>(position_));
}

void Session::stepped(const Forward& f, int32_t id) {
  token_counts_.read(&id, 1, position_);
  advance(f);
}

void Session::start_step(int32_t id) {
  dead = true;
  (void)start_forward(&id, 1, nullptr);
  dead = false;
}

void Session::finish_step(int32_t id) {
  dead = true;
  executor_->finish();
  stepped(next_step(), id);
  dead = false;
}

Forward Session::start_forward(const int32_t* ids, size_t n, float* all_logits) {
  const Forward f = cadence_.next(length_, n);
  executor_->forward(f, ids, position_, length_, all_logits);
  f.fuses ? executor_->fuse(f, length_) : executor_->append(f, length_);
  return f;
}

void Session::advance(const Forward& f) {
  length_ = f.after;
  position_ += f.n;
  ++(f.n == 1 ? steps_ : blocks_);
  fusions_ += f.fuses ? 1 : 0;
}

template <typename F>
bool Session::read_window(F&& accept) {
  dead = true;
  ++windows_;
  idle_seconds_ += executor_->run_window(position_, window_.data());
  size_t accepted = 0;
  while (accepted < window_.size() && accept(window_[accepted])) ++accepted;
  const bool whole = accepted == window_.size();
  executor_->end_window(whole);
  if (whole) {
    for (const int32_t& id : window_) token_counts_.read(&id, 1, position_);
    position_ += static_cast<int64_t>(window_.size());
    steps_ += static_cast<int64_t>(window_.size());
    ++fusions_;
  } else {
    // One by one from where the window began: the same state as if it had never been a window.
    for (size_t i = 0; i < accepted; ++i) read_tokens(&window_[i], 1, nullptr, /*cancellable=*/false);
  }
  dead = false;
  return whole;
}

void Session::prefill(const int32_t* ids, size_t n, float* all_logits) {
  check_alone();
  check_readable(ids, n);
  if (all_logits != nullptr && !model_->backend->has_all_logits()) {
    fail(LOCOCO_ERROR_UNSUPPORTED,
         "all_logits: the engines have no lm_head_%d; run lococo-build --force with a recipe whose widths name block",
         m_.block_size);
  }
  read_tokens(ids, n, all_logits);
}

void Session::step(int32_t id) { prefill(&id, 1, nullptr); }

void Session::check_not_empty() const {
  if (position_ == 0) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT,
         "logits: expected a session that has read a token, got an empty one; prefill it");
  }
}

const float* Session::logits() {
  check_not_empty();
  return executor_->logits();
}

int32_t Session::sample(const lococo_sampling_params& params) {
  sampler_.check(params);
  return sampler_.sample(logits(), token_counts_, params, static_cast<uint64_t>(position_));
}

void Session::distribution(const lococo_sampling_params& params, float* probabilities) {
  sampler_.check(params);
  sampler_.distribution(logits(), token_counts_, params, probabilities);
}

void Session::logprobs(int32_t id, int32_t n, float* logprob, int32_t* top_ids, float* top_logprobs) {
  sampler_.logprobs(logits(), id, n, logprob, top_ids, top_logprobs);
}

int32_t Session::generate(const lococo_sampling_params& params, int32_t max_tokens, lococo_token_fn on_token,
                          void* user) {
  check_alone();
  if (max_tokens < 0) fail(LOCOCO_ERROR_INVALID_ARGUMENT, "max_tokens: expected at least 0, got %d", max_tokens);
  if (max_tokens > kMaxPosition - position_) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "max_tokens: expected at most %lld at position %lld, got %d; reset the session",
         static_cast<long long>(kMaxPosition - position_), static_cast<long long>(position_), max_tokens);
  }
  sampler_.check(params);
  check_not_empty();
  const bool greedy = Sampler::is_plain_greedy(params);
  const int32_t* stops = params.stop_token_ids;
  const int32_t* stops_end = stops + params.num_stop_token_ids;
  int32_t count = 0;
  const auto accept = [&](int32_t id) {  // false: the last one, which is not read
    ++count;
    const bool stop = on_token != nullptr && on_token(id, user) != 0;
    const auto& eos = m_.eos_token_ids;
    const bool ends = (params.ignore_eos == 0 && std::find(eos.begin(), eos.end(), id) != eos.end()) ||
                      std::find(stops, stops_end, id) != stops_end;
    return !stop && !ends && count < max_tokens;
  };
  while (count < max_tokens) {
    if (cancelled.load(std::memory_order_relaxed)) fail_cancelled();
    const auto window = static_cast<int32_t>(window_.size());
    if (greedy && window > 0 && length_ == m_.mem_size && max_tokens - count > window) {
      bool ended = false;
      const bool whole = read_window([&](int32_t id) {
        ended = !accept(id);
        return !ended && !cancelled.load(std::memory_order_relaxed);
      });
      if (ended) break;
      if (!whole) fail_cancelled();
      continue;
    }
    int32_t id = 0;
    try {
      id = sampler_.sample(executor_->logits(), token_counts_, params, static_cast<uint64_t>(position_));
    } catch (const Error& e) {
      dead = e.status() == LOCOCO_ERROR_BACKEND;
      throw;
    }
    if (!accept(id)) break;
    read_tokens(&id, 1, nullptr);
  }
  return count;
}

// --- state -----------------------------------------------------------------------------------------------------------

size_t Session::state_size() const { return kStateHeaderBytes + m_.state_bytes; }

void Session::state_get(uint8_t* buffer) {
  uint8_t* payload = buffer + kStateHeaderBytes;
  store_int64(payload, position_);
  store_int64(payload + 8, length_);
  executor_->read_state(payload + 16);
  clear_stale_columns(m_, payload, length_);
  std::memcpy(payload + m_.state_bytes - token_counts_.nbytes(), token_counts_.data(), token_counts_.nbytes());
  seal_state(m_, buffer);
}

void Session::state_set(const uint8_t* buffer, size_t size) {
  check_state_header(m_, buffer, size);
  check_state(m_, buffer);
  adopt(buffer + kStateHeaderBytes);
}

void Session::adopt(const uint8_t* payload) {
  check_alone();
  dead = true;  // until it is there whole
  executor_->write_state(payload + 16);
  std::memcpy(token_counts_.data(), payload + m_.state_bytes - token_counts_.nbytes(), token_counts_.nbytes());
  position_ = load_int64(payload);
  length_ = static_cast<int32_t>(load_int64(payload + 8));
  clear_counters();
  dead = false;
}

void Session::save(const std::string& path) {
  std::vector<uint8_t> state(state_size());
  state_get(state.data());
  write_file_atomically(path, state);
}

void Session::load(const std::string& path) {
  try {
    InputFile file(path);
    const uint64_t size = file.size();
    const std::unique_ptr<uint8_t[]> state(new uint8_t[state_size()]);  // not filled with zeros first
    const size_t header_bytes = file.read(state.get(), kStateHeaderBytes);
    check_state_header(m_, state.get(), header_bytes < kStateHeaderBytes ? header_bytes : size);
    if (kStateHeaderBytes + file.read(state.get() + kStateHeaderBytes, size - kStateHeaderBytes) != size) {
      fail(LOCOCO_ERROR_CORRUPT, "expected %zu bytes; the file shrank while it was read", state_size());
    }
    check_state(m_, state.get());
    adopt(state.get() + kStateHeaderBytes);
  } catch (const Error& e) {
    if (e.status() == LOCOCO_ERROR_NOT_FOUND || e.status() == LOCOCO_ERROR_IO) throw;  // name the path already
    throw Error(e.status(), path + ": " + e.what());
  }
}

}  // namespace lococo
