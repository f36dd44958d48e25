// lococo.cc - the C boundary: arguments checked, exceptions turned into statuses, sessions guarded. Nothing else.
#include "lococo.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>

#include "batch.h"
#include "error.h"
#include "pool.h"
#include "session.h"
#include "stops.h"

struct lococo_model {
  std::shared_ptr<lococo::Model> impl;
};

struct lococo_pool {
  lococo::Pool impl;
};

struct lococo_session {
  explicit lococo_session(std::shared_ptr<lococo::Model> model)
      : owned(std::make_unique<lococo::Session>(std::move(model))), impl(*owned) {}
  explicit lococo_session(lococo::Session& of_pool) : impl(of_pool) {}
  std::unique_ptr<lococo::Session> owned;  // NULL: a pool's
  lococo::Session& impl;
};

struct lococo_stops {
  lococo::Stops impl;
};

struct lococo_batch {
  explicit lococo_batch(std::shared_ptr<lococo::Model> model) : impl(std::move(model)) {}
  lococo::Batch impl;
};

namespace {

using lococo::fail;

// A fixed buffer, so that an error text never needs memory. Longer texts are cut.
thread_local char last_error[4096] = "";

std::mutex log_mutex;
lococo_log_fn log_fn = nullptr;
void* log_user = nullptr;

lococo_status record(lococo_status status, const char* text) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", text);
  return status;
}

// The only place where exceptions end.
template <typename F>
lococo_status guarded(F&& body) noexcept {
  try {
    body();
    return LOCOCO_OK;
  } catch (const lococo::Error& e) {
    return record(e.status(), e.what());
  } catch (const std::bad_alloc&) {
    return record(LOCOCO_ERROR_OUT_OF_MEMORY, "out of memory; close sessions or use a smaller model");
  } catch (const std::exception& e) {
    return record(LOCOCO_ERROR_INTERNAL, e.what());
  } catch (...) {
    return record(LOCOCO_ERROR_INTERNAL, "an exception of unknown type");
  }
}

template <typename T>
void require(const T* pointer, const char* name) {
  if (pointer == nullptr) fail(LOCOCO_ERROR_INVALID_ARGUMENT, "%s: expected a pointer, got NULL", name);
}

void require_size(size_t got, size_t expected, const char* name) {
  if (got != expected) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT,
         "%s: struct_size: expected %zu, got %zu; set it to sizeof(%s) of this release's lococo.h", name, expected, got,
         name);
  }
}

// Holds a session or a batch for one call.
class Hold {
 public:
  explicit Hold(lococo::Session& session) : Hold(session.busy, "session") {}
  explicit Hold(lococo::Batch& batch) : Hold(batch.busy, "batch") {}
  ~Hold() { busy_.store(false, std::memory_order_release); }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

 private:
  Hold(std::atomic<bool>& busy, const char* what) : busy_(busy) {
    if (busy_.exchange(true, std::memory_order_acquire)) {
      fail(LOCOCO_ERROR_BUSY, "%s: in use by another thread or by the callback's caller; use one %s a thread", what,
           what);
    }
  }

  std::atomic<bool>& busy_;
};

enum class Dead { kRefused, kAllowed };

void require_alive(const lococo::Session& session) {
  if (session.dead) {
    fail(LOCOCO_ERROR_DEAD, "session: an earlier backend error left it unusable; reset it or load a state");
  }
}

template <typename F>
lococo_status with_session(lococo_session* session, Dead dead, F&& body) noexcept {
  return guarded([&] {
    require(session, "session");
    const Hold hold(session->impl);
    if (dead == Dead::kRefused) require_alive(session->impl);
    body(session->impl);
  });
}

template <typename F>
lococo_status with_batch(lococo_batch* batch, F&& body) noexcept {
  return guarded([&] {
    require(batch, "batch");
    const Hold hold(batch->impl);
    body(batch->impl);
  });
}

// N of "cuda:N".
int32_t cuda_index(const std::string& device, const std::string& backend) {
  const std::string digits = device.rfind("cuda:", 0) == 0 ? device.substr(5) : "";
  const bool sound =
      !digits.empty() && digits.size() <= 3 && digits.find_first_not_of("0123456789") == std::string::npos;
  if (!sound) {
    fail(LOCOCO_ERROR_UNSUPPORTED, "device: backend %s expects %s\"cuda:0\" or another number, got \"%s\"",
         backend.c_str(), backend == "onnxruntime" ? "\"cpu\", " : "", device.c_str());
  }
  return static_cast<int32_t>(std::stoi(digits));
}

// NULL stands for the default.
lococo_sampling_params or_greedy(const lococo_sampling_params* params) {
  lococo_sampling_params greedy = {};
  greedy.struct_size = sizeof greedy;
  return params != nullptr ? *params : greedy;
}

}  // namespace

void lococo::log_line(lococo_log_level level, const std::string& text) noexcept {
  lococo_log_fn fn = nullptr;
  void* user = nullptr;
  {
    const std::lock_guard<std::mutex> lock(log_mutex);
    fn = log_fn;
    user = log_user;
  }
  if (fn != nullptr) fn(level, text.c_str(), user);
}

int32_t lococo_abi_version(void) { return LOCOCO_ABI_VERSION; }

const char* lococo_version(void) { return LOCOCO_VERSION; }

const char* lococo_last_error(void) { return last_error; }

void lococo_set_log_callback(lococo_log_fn fn, void* user) {
  const std::lock_guard<std::mutex> lock(log_mutex);
  log_fn = fn;
  log_user = user;
}

lococo_status lococo_model_open(const char* bundle_dir, const lococo_options* options, lococo_model** out) {
  return guarded([&] {
    require(bundle_dir, "bundle_dir");
    require(out, "out");
    std::string device = "cpu";
    std::string backend = "onnxruntime";
    lococo::BackendOptions backend_options;
    if (options != nullptr) {
      require_size(options->struct_size, sizeof *options, "lococo_options");
      if (options->device != nullptr) device = options->device;
      if (options->backend != nullptr) backend = options->backend;
      if (options->num_threads < 0) {
        fail(LOCOCO_ERROR_INVALID_ARGUMENT, "num_threads: expected at least 0 (0: one per core), got %d",
             options->num_threads);
      }
      if (options->backend_library != nullptr) backend_options.library = options->backend_library;
      backend_options.num_threads = options->num_threads;
      backend_options.skip_hashes = options->skip_hashes != 0;
    }
    const bool tensorrt = backend == "tensorrt";
    if (!tensorrt && backend != "onnxruntime") {
      fail(LOCOCO_ERROR_UNSUPPORTED, "backend: expected \"onnxruntime\" or \"tensorrt\", got \"%s\"", backend.c_str());
    }
    std::optional<int32_t> cuda_device;
    if (tensorrt || device != "cpu") cuda_device = cuda_index(device, backend);
    auto model = std::make_shared<lococo::Model>();
    model->manifest = lococo::read_manifest(bundle_dir);
    lococo::check_files(model->manifest, backend_options.skip_hashes);
    model->backend = tensorrt ? lococo::open_tensorrt(model->manifest, backend_options, *cuda_device)
                              : lococo::open_onnxruntime(model->manifest, backend_options, cuda_device);
    *out = new lococo_model{std::move(model)};
  });
}

void lococo_model_close(lococo_model* model) { delete model; }

lococo_status lococo_model_get_info(const lococo_model* model, lococo_model_info* info) {
  return guarded([&] {
    require(model, "model");
    require(info, "info");
    require_size(info->struct_size, sizeof *info, "lococo_model_info");
    const lococo::Manifest& m = model->impl->manifest;
    const lococo::Backend& backend = *model->impl->backend;
    *info = {sizeof *info,
             m.vocab_size,
             m.num_layers,
             m.num_kv_heads,
             m.head_dim,
             m.mem_size,
             m.capacity,
             m.block_size,
             m.max_batch(),
             m.state_bytes,
             model->impl->session_bytes(),
             backend.batch_bytes(),
             m.bundle_id.c_str(),
             m.dtype_text.c_str()};
  });
}

lococo_status lococo_session_create(lococo_model* model, lococo_session** out) {
  return guarded([&] {
    require(model, "model");
    require(out, "out");
    *out = new lococo_session(model->impl);
  });
}

void lococo_session_destroy(lococo_session* session) {
  if (session == nullptr) return;
  if (session->owned == nullptr) {
    lococo::log_line(LOCOCO_LOG_ERROR, "lococo_session_destroy: the session is a pool's; release it to the pool");
    return;
  }
  if (session->impl.busy.exchange(true, std::memory_order_acquire)) {
    lococo::log_line(LOCOCO_LOG_ERROR, "lococo_session_destroy: the session is in use; it was not destroyed");
    return;
  }
  if (session->impl.batch() != nullptr) {
    if (guarded([&] {
          const Hold hold(*session->impl.batch());
          session->impl.batch()->remove(session->impl);
        }) != LOCOCO_OK) {
      session->impl.busy.store(false, std::memory_order_release);
      lococo::log_line(LOCOCO_LOG_ERROR, "lococo_session_destroy: the session's batch is in use; it was not destroyed");
      return;
    }
  }
  delete session;
}

lococo_status lococo_session_reset(lococo_session* session) {
  return with_session(session, Dead::kAllowed, [](lococo::Session& s) { s.reset(); });
}

lococo_status lococo_session_clone(lococo_session* session, lococo_session** out) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    require(out, "out");
    auto copy = std::make_unique<lococo_session>(s.model());
    copy->impl.copy_from(s);
    *out = copy.release();
  });
}

lococo_status lococo_session_prefill(lococo_session* session, const int32_t* ids, size_t n, float* all_logits) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    if (n > 0) require(ids, "ids");
    s.prefill(ids, n, all_logits);
  });
}

lococo_status lococo_session_step(lococo_session* session, int32_t id) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) { s.step(id); });
}

lococo_status lococo_session_logits(lococo_session* session, const float** logits) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    require(logits, "logits");
    *logits = s.logits();
  });
}

lococo_status lococo_session_sample(lococo_session* session, const lococo_sampling_params* params, int32_t* id) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    require(id, "id");
    *id = s.sample(or_greedy(params));
  });
}

lococo_status lococo_session_distribution(lococo_session* session, const lococo_sampling_params* params,
                                          float* probabilities) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    require(probabilities, "probabilities");
    s.distribution(or_greedy(params), probabilities);
  });
}

lococo_status lococo_session_logprobs(lococo_session* session, int32_t id, int32_t n, float* logprob, int32_t* top_ids,
                                      float* top_logprobs) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    require(logprob, "logprob");
    if (n > 0) {
      require(top_ids, "top_ids");
      require(top_logprobs, "top_logprobs");
    }
    s.logprobs(id, n, logprob, top_ids, top_logprobs);
  });
}

lococo_status lococo_session_generate(lococo_session* session, const lococo_sampling_params* params, int32_t max_tokens,
                                      lococo_token_fn on_token, void* user, int32_t* num_generated) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    const int32_t count = s.generate(or_greedy(params), max_tokens, on_token, user);
    if (num_generated != nullptr) *num_generated = count;
  });
}

lococo_status lococo_session_cancel(lococo_session* session, int32_t cancel) {
  return guarded([&] {
    require(session, "session");
    session->impl.cancelled.store(cancel != 0, std::memory_order_relaxed);
  });
}

lococo_status lococo_session_position(lococo_session* session, int64_t* position) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    require(position, "position");
    *position = s.position();
  });
}

lococo_status lococo_session_live_slots(lococo_session* session, int32_t* live_slots) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    require(live_slots, "live_slots");
    *live_slots = s.live_slots();
  });
}

lococo_status lococo_session_windows(lococo_session* session, int64_t* windows, double* idle_seconds) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    if (windows != nullptr) *windows = s.windows();
    if (idle_seconds != nullptr) *idle_seconds = s.idle_seconds();
  });
}

lococo_status lococo_session_counters(lococo_session* session, int64_t* steps, int64_t* blocks, int64_t* fusions) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    if (steps != nullptr) *steps = s.steps();
    if (blocks != nullptr) *blocks = s.blocks();
    if (fusions != nullptr) *fusions = s.fusions();
  });
}

lococo_status lococo_session_state_size(lococo_session* session, size_t* size) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    require(size, "size");
    *size = s.state_size();
  });
}

lococo_status lococo_session_state_get(lococo_session* session, void* buffer, size_t size) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    require(buffer, "buffer");
    if (size != s.state_size()) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT, "size: expected %zu (lococo_session_state_size), got %zu", s.state_size(),
           size);
    }
    s.state_get(static_cast<uint8_t*>(buffer));
  });
}

lococo_status lococo_session_state_set(lococo_session* session, const void* buffer, size_t size) {
  return with_session(session, Dead::kAllowed, [&](lococo::Session& s) {
    if (size > 0) require(buffer, "buffer");
    s.state_set(static_cast<const uint8_t*>(buffer), size);
  });
}

lococo_status lococo_session_save(lococo_session* session, const char* path) {
  return with_session(session, Dead::kRefused, [&](lococo::Session& s) {
    require(path, "path");
    s.save(path);
  });
}

lococo_status lococo_session_load(lococo_session* session, const char* path) {
  return with_session(session, Dead::kAllowed, [&](lococo::Session& s) {
    require(path, "path");
    s.load(path);
  });
}

lococo_status lococo_stops_create(const char* const* strings, size_t n, lococo_stops** out) {
  return guarded([&] {
    if (n > 0) require(strings, "strings");
    require(out, "out");
    *out = new lococo_stops{lococo::Stops(strings, n)};
  });
}

void lococo_stops_destroy(lococo_stops* stops) { delete stops; }

lococo_status lococo_stops_push(lococo_stops* stops, const char* text, size_t size, const char** out, size_t* out_size,
                                int32_t* matched) {
  return guarded([&] {
    require(stops, "stops");
    if (size > 0) require(text, "text");
    require(out, "out");
    require(out_size, "out_size");
    require(matched, "matched");
    const lococo::Stops::Shown shown = stops->impl.push(text, size);
    *out = shown.text;
    *out_size = shown.size;
    *matched = shown.matched;
  });
}

lococo_status lococo_stops_finish(lococo_stops* stops, const char** out, size_t* out_size) {
  return guarded([&] {
    require(stops, "stops");
    require(out, "out");
    require(out_size, "out_size");
    const lococo::Stops::Shown shown = stops->impl.finish();
    *out = shown.text;
    *out_size = shown.size;
  });
}

lococo_status lococo_stops_reset(lococo_stops* stops) {
  return guarded([&] {
    require(stops, "stops");
    stops->impl.reset();
  });
}

lococo_status lococo_pool_create(lococo_model* model, const lococo_pool_options* options, lococo_pool** out) {
  return guarded([&] {
    require(model, "model");
    require(options, "options");
    require(out, "out");
    require_size(options->struct_size, sizeof *options, "lococo_pool_options");
    require(options->directory, "directory");
    if ((options->budget_bytes == 0) == (options->max_sessions == 0)) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT, "lococo_pool_options: expected one of budget_bytes and max_sessions");
    }
    const uint64_t session_bytes = model->impl->session_bytes();
    const uint64_t fitting = options->budget_bytes / session_bytes;
    if (options->max_sessions == 0 && fitting == 0) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT, "budget_bytes: expected at least %llu, one session of this model, got %llu",
           static_cast<unsigned long long>(session_bytes), static_cast<unsigned long long>(options->budget_bytes));
    }
    *out = new lococo_pool{
        {model->impl, options->directory, options->max_sessions != 0 ? options->max_sessions : fitting}};
  });
}

void lococo_pool_destroy(lococo_pool* pool) {
  if (pool == nullptr) return;
  if (pool->impl.info().num_acquired > 0) {
    lococo::log_line(LOCOCO_LOG_ERROR, "lococo_pool_destroy: sessions are acquired; the pool was not destroyed");
    return;
  }
  delete pool;
}

lococo_status lococo_pool_acquire(lococo_pool* pool, const char* id, const char* start, int32_t timeout_ms,
                                  lococo_session** out) {
  return guarded([&] {
    require(pool, "pool");
    require(id, "id");
    require(out, "out");
    lococo::Session& session = pool->impl.acquire(id, start, timeout_ms);
    try {
      *out = new lococo_session(session);
    } catch (...) {
      pool->impl.release(session);
      throw;
    }
  });
}

lococo_status lococo_pool_release(lococo_pool* pool, lococo_session* session) {
  return guarded([&] {
    require(pool, "pool");
    require(session, "session");
    pool->impl.release(session->impl);
    delete session;
  });
}

lococo_status lococo_pool_flush(lococo_pool* pool, const char* id) {
  return guarded([&] {
    require(pool, "pool");
    if (id != nullptr) {
      pool->impl.flush(id);
    } else {
      pool->impl.flush_all();
    }
  });
}

lococo_status lococo_pool_remove(lococo_pool* pool, const char* id) {
  return guarded([&] {
    require(pool, "pool");
    require(id, "id");
    pool->impl.remove(id);
  });
}

lococo_status lococo_pool_find(lococo_pool* pool, const char* id, lococo_place* place) {
  return guarded([&] {
    require(pool, "pool");
    require(id, "id");
    require(place, "place");
    *place = pool->impl.place(id);
  });
}

lococo_status lococo_pool_list(lococo_pool* pool, lococo_place_fn fn, void* user) {
  return guarded([&] {
    require(pool, "pool");
    if (fn == nullptr) fail(LOCOCO_ERROR_INVALID_ARGUMENT, "fn: expected a function, got NULL");
    for (const auto& [id, place] : pool->impl.list()) {
      if (fn(id.c_str(), place, user) != 0) return;
    }
  });
}

lococo_status lococo_pool_get_info(lococo_pool* pool, lococo_pool_info* info) {
  return guarded([&] {
    require(pool, "pool");
    require(info, "info");
    require_size(info->struct_size, sizeof *info, "lococo_pool_info");
    *info = pool->impl.info();
  });
}

lococo_status lococo_batch_create(lococo_model* model, lococo_batch** out) {
  return guarded([&] {
    require(model, "model");
    require(out, "out");
    *out = new lococo_batch(model->impl);
  });
}

void lococo_batch_destroy(lococo_batch* batch) {
  if (batch == nullptr) return;
  const lococo_status status = with_batch(batch, [](lococo::Batch& b) {
    std::deque<Hold> holds;
    for (lococo::Session* session : b.sessions()) {
      if (session != nullptr) holds.emplace_back(*session);
    }
    for (lococo::Session* session : b.sessions()) {
      if (session != nullptr) b.remove(*session);
    }
  });
  if (status != LOCOCO_OK) {
    lococo::log_line(LOCOCO_LOG_ERROR,
                     "lococo_batch_destroy: the batch or a session in it is in use; nothing was done");
    return;
  }
  delete batch;
}

lococo_status lococo_batch_add(lococo_batch* batch, lococo_session* session) {
  return with_batch(batch, [&](lococo::Batch& b) {
    require(session, "session");
    const Hold hold(session->impl);
    require_alive(session->impl);
    b.add(session->impl);
  });
}

lococo_status lococo_batch_remove(lococo_batch* batch, lococo_session* session) {
  return with_batch(batch, [&](lococo::Batch& b) {
    require(session, "session");
    const Hold hold(session->impl);
    b.remove(session->impl);
  });
}

lococo_status lococo_batch_get_implementation(const lococo_batch* batch, lococo_batch_implementation* implementation) {
  return guarded([&] {
    require(batch, "batch");
    require(implementation, "implementation");
    *implementation = batch->impl.is_loop() ? LOCOCO_BATCH_LOOP : LOCOCO_BATCH_GRAPH;
  });
}

lococo_status lococo_batch_step(lococo_batch* batch, lococo_session* const* sessions, const int32_t* ids, size_t n) {
  return with_batch(batch, [&](lococo::Batch& b) {
    if (n > 0) {
      require(sessions, "sessions");
      require(ids, "ids");
    }
    if (n > b.sessions().size()) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT, "n: expected at most %zu sessions, got %zu", b.sessions().size(), n);
    }
    std::deque<Hold> holds;
    std::vector<lococo::Session*> members;
    for (size_t i = 0; i < n; ++i) {
      require(sessions[i], "session");
      if (std::find(sessions, sessions + i, sessions[i]) != sessions + i) {
        fail(LOCOCO_ERROR_INVALID_ARGUMENT, "sessions[%zu]: expected each session once, got one again", i);
      }
      members.push_back(&sessions[i]->impl);
      holds.emplace_back(*members.back());
      require_alive(*members.back());
    }
    b.step(members.data(), ids, n);
  });
}
