// The C interface on a real bundle ($LOCOCO_TEST_BUNDLE) and a real ONNX Runtime ($LOCOCO_ONNXRUNTIME).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "lococo.h"
#include "sha256.h"

namespace {

constexpr int kSkip = 77;
constexpr size_t kHeaderBytes = 88;

#define OK(call)                                                                                   \
  do {                                                                                             \
    const lococo_status status = (call);                                                           \
    check(status == LOCOCO_OK, __FILE__, __LINE__, std::string(#call ": ") + lococo_last_error()); \
  } while (false)

#define REFUSED(status, part, call)                                                                         \
  do {                                                                                                      \
    const lococo_status got = (call);                                                                       \
    check(got == (status) && std::strstr(lococo_last_error(), part) != nullptr, __FILE__, __LINE__,         \
          std::string(#call ": expected " #status " and \"" part "\", got ") + std::to_string(got) + ": " + \
              lococo_last_error());                                                                         \
  } while (false)

std::string bundle;
lococo_model* model = nullptr;
lococo_model_info info = {};

std::vector<uint8_t> state_of(lococo_session* session) {
  size_t size = 0;
  OK(lococo_session_state_size(session, &size));
  std::vector<uint8_t> bytes(size);
  OK(lococo_session_state_get(session, bytes.data(), bytes.size()));
  return bytes;
}

struct Session {
  lococo_session* handle = nullptr;
  Session() { OK(lococo_session_create(model, &handle)); }
  explicit Session(lococo_session* taken) : handle(taken) {}
  ~Session() { lococo_session_destroy(handle); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  operator lococo_session*() const { return handle; }  // NOLINT: so that tests read like C

  [[nodiscard]] std::vector<float> logits() const {
    const float* p = nullptr;
    OK(lococo_session_logits(handle, &p));
    return p == nullptr ? std::vector<float>() : std::vector<float>(p, p + info.vocab_size);
  }
  [[nodiscard]] int64_t position() const {
    int64_t value = -1;
    OK(lococo_session_position(handle, &value));
    return value;
  }
  [[nodiscard]] int32_t live() const {
    int32_t value = -1;
    OK(lococo_session_live_slots(handle, &value));
    return value;
  }
  [[nodiscard]] std::vector<uint8_t> state() const { return state_of(handle); }
};

std::vector<int32_t> tokens(int n, int seed = 1) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) ids[static_cast<size_t>(i)] = (i * 7919 + seed * 104'729) % info.vocab_size;
  return ids;
}

void prefill(lococo_session* s, const std::vector<int32_t>& ids, float* all_logits = nullptr) {
  OK(lococo_session_prefill(s, ids.data(), ids.size(), all_logits));
}

std::vector<int32_t> generate(lococo_session* s, int n, const lococo_sampling_params* params = nullptr) {
  std::vector<int32_t> ids;
  int32_t count = -1;
  const auto collect = [](int32_t id, void* user) {
    static_cast<std::vector<int32_t>*>(user)->push_back(id);
    return 0;
  };
  OK(lococo_session_generate(s, params, n, collect, &ids, &count));
  CHECK_EQ(count, static_cast<int32_t>(ids.size()));
  return ids;
}

// A state after its payload was changed, with a checksum that fits again.
void reseal(std::vector<uint8_t>& state) {
  lococo::Sha256 sha;
  sha.update(state.data(), 56);
  sha.update(state.data() + kHeaderBytes, state.size() - kHeaderBytes);
  const lococo::Digest sum = sha.digest();
  std::copy(sum.begin(), sum.end(), state.begin() + 56);
}

void opening() {
  CHECK_EQ(lococo_abi_version(), LOCOCO_ABI_VERSION);
  CHECK(std::strlen(lococo_version()) >= 5);
  lococo_model* none = nullptr;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "bundle_dir", lococo_model_open(nullptr, nullptr, &none));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "out", lococo_model_open(bundle.c_str(), nullptr, nullptr));
  REFUSED(LOCOCO_ERROR_NOT_FOUND, "/nowhere", lococo_model_open("/nowhere", nullptr, &none));
  lococo_options options = {};
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "struct_size", lococo_model_open(bundle.c_str(), &options, &none));
  options.struct_size = sizeof options;
  options.device = "cuda";
  REFUSED(LOCOCO_ERROR_UNSUPPORTED, "device", lococo_model_open(bundle.c_str(), &options, &none));
  options.device = "cpu";
  options.backend = "tensorrt";
  REFUSED(LOCOCO_ERROR_UNSUPPORTED, "backend", lococo_model_open(bundle.c_str(), &options, &none));
  options.backend = "onnxruntime";
  options.num_threads = -1;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "num_threads", lococo_model_open(bundle.c_str(), &options, &none));
  options.num_threads = 0;
  options.backend_library = "/nowhere/libonnxruntime.so";
  REFUSED(LOCOCO_ERROR_NOT_FOUND, "/nowhere/libonnxruntime.so", lococo_model_open(bundle.c_str(), &options, &none));
  options.backend_library = "libm.so.6";
  REFUSED(LOCOCO_ERROR_UNSUPPORTED, "OrtGetApiBase", lococo_model_open(bundle.c_str(), &options, &none));
  CHECK(none == nullptr);

  options.backend_library = nullptr;
  options.num_threads = 1;
  OK(lococo_model_open(bundle.c_str(), &options, &model));
  options.num_threads = 2;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "num_threads", lococo_model_open(bundle.c_str(), &options, &none));
  options.num_threads = 1;
  options.skip_hashes = 1;
  OK(lococo_model_open(bundle.c_str(), &options, &none));
  lococo_model_close(none);
  lococo_model_close(nullptr);

  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "struct_size", lococo_model_get_info(model, &info));
  info.struct_size = sizeof info;
  OK(lococo_model_get_info(model, &info));
  CHECK(info.vocab_size > 1 && info.mem_size >= 1 && info.block_size >= 1 && info.capacity >= info.mem_size);
  CHECK_EQ(std::strlen(info.bundle_id), 64u);
  CHECK(info.session_bytes > 2 * (info.state_bytes - static_cast<uint64_t>(info.vocab_size) * 4));
  std::printf("bundle: M %d, C %d, B %d, %s, state %llu bytes, session %llu bytes\n", info.mem_size, info.capacity,
              info.block_size, info.dtype, static_cast<unsigned long long>(info.state_bytes),
              static_cast<unsigned long long>(info.session_bytes));
}

void empty_session() {
  const Session s;
  CHECK_EQ(s.position(), 0);
  CHECK_EQ(s.live(), 0);
  const float* logits = nullptr;
  int32_t id = 0;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "empty", lococo_session_logits(s, &logits));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "empty", lococo_session_sample(s, nullptr, &id));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "empty", lococo_session_generate(s, nullptr, 1, nullptr, nullptr, nullptr));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "at least one token", lococo_session_prefill(s, &id, 0, nullptr));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "ids", lococo_session_prefill(s, nullptr, 1, nullptr));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "ids[0]", lococo_session_step(s, info.vocab_size));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "ids[0]", lococo_session_step(s, -1));
  std::vector<int32_t> ids = tokens(2 * info.block_size);
  ids.back() = info.vocab_size;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "token id from 0", lococo_session_prefill(s, ids.data(), ids.size(), nullptr));
  CHECK_EQ(s.position(), 0);  // all ids are checked first
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "session", lococo_session_reset(nullptr));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "position", lococo_session_position(s, nullptr));
  lococo_session_destroy(nullptr);

  const Session other;  // an empty state is a state
  prefill(other, tokens(5));
  const std::vector<uint8_t> state = s.state();
  OK(lococo_session_state_set(other, state.data(), state.size()));
  CHECK_EQ(other.position(), 0);
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "empty", lococo_session_logits(other, &logits));
}

// Prompts of lengths around every boundary; slots follow the rule, and the last row of all_logits is the logits.
void reading() {
  const int block = info.block_size;
  for (const int base : {1, block, info.mem_size, info.capacity, 3 * block, info.capacity + block}) {
    for (const int n : {base - 1, base, base + 1}) {
      if (n < 1) continue;
      const Session s;
      const std::vector<int32_t> ids = tokens(n);
      std::vector<float> all(static_cast<size_t>(n) * static_cast<size_t>(info.vocab_size), NAN);
      prefill(s, ids, all.data());
      int length = 0;
      int64_t fusions = 0;
      for (int left = n; left > 0; left -= block) {
        length += std::min(left, block);
        if (length > info.capacity) length = info.mem_size, ++fusions;
      }
      CHECK_EQ(s.position(), n);
      CHECK_EQ(s.live(), length);
      int64_t steps = 0;
      int64_t blocks = 0;
      int64_t fused = 0;
      OK(lococo_session_counters(s, &steps, &blocks, &fused));
      CHECK_EQ(steps + blocks, (n + block - 1) / block);
      CHECK_EQ(steps, n % block == 1 || block == 1 ? (block == 1 ? n : 1) : 0);
      CHECK_EQ(fused, fusions);
      const std::vector<float> logits = s.logits();
      float worst = 0;
      for (size_t i = 0; i < logits.size(); ++i) {
        worst = std::max(worst, std::abs(logits[i] - all[all.size() - logits.size() + i]));
      }
      CHECK(worst < (info.dtype == std::string("float32") ? 1e-4f : 0.1f));
      CHECK(std::none_of(all.begin(), all.end(), [](float x) { return std::isnan(x); }));

      const Session plain;  // the same without all_logits, bit for bit
      prefill(plain, ids);
      CHECK(plain.state() == s.state());
    }
  }
}

void generating() {
  const Session s;
  prefill(s, tokens(info.block_size + 3));
  const Session stepped;
  prefill(stepped, tokens(info.block_size + 3));
  const std::vector<int32_t> ids = generate(s, 3 * info.capacity - 2 * info.mem_size + 5);
  for (size_t i = 0; i < ids.size(); ++i) {
    const std::vector<float> logits = stepped.logits();
    const int32_t best = static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    CHECK_EQ(ids[i], best);
    if (i + 1 < ids.size()) OK(lococo_session_step(stepped, best));  // the last one is not read
  }
  CHECK(s.state() == stepped.state());

  lococo_sampling_params params = {};
  params.struct_size = sizeof params;
  params.temperature = 0.9;
  params.top_k = 20;
  params.top_p = 0.95;
  params.seed = 7;
  const auto drawn = [&](uint64_t seed) {
    const Session fresh;
    prefill(fresh, tokens(5));
    params.seed = seed;
    return generate(fresh, 24, &params);
  };
  CHECK(drawn(7) == drawn(7));
  CHECK(drawn(7) != drawn(8));
  int32_t first = -1;
  const Session fresh;
  prefill(fresh, tokens(5));
  params.seed = 7;
  OK(lococo_session_sample(fresh, &params, &first));
  CHECK_EQ(first, drawn(7)[0]);

  const auto n = static_cast<size_t>(info.vocab_size);
  std::vector<float> probabilities(n);
  OK(lococo_session_distribution(fresh, &params, probabilities.data()));
  CHECK(probabilities[static_cast<size_t>(first)] > 0);
  CHECK(std::count(probabilities.begin(), probabilities.end(), 0.0f) >= static_cast<std::ptrdiff_t>(n) - 20);
  OK(lococo_session_distribution(fresh, nullptr, probabilities.data()));
  const std::vector<float> logits = fresh.logits();
  const auto best = static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  CHECK_EQ(probabilities[static_cast<size_t>(best)], 1.0f);
  float logprob = 0;
  float top[3] = {};
  int32_t top_ids[3] = {};
  OK(lococo_session_logprobs(fresh, best, 3, &logprob, top_ids, top));
  CHECK_EQ(top_ids[0], best);
  CHECK_EQ(top[0], logprob);
  CHECK(top[1] <= top[0] && top[2] <= top[1]);
  OK(lococo_session_logprobs(fresh, best, 0, &logprob, nullptr, nullptr));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "top_ids",
          lococo_session_logprobs(fresh, best, 1, &logprob, nullptr, nullptr));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "probabilities", lococo_session_distribution(fresh, &params, nullptr));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "id", lococo_session_logprobs(fresh, -1, 0, &logprob, nullptr, nullptr));

  // A stop token ends generation as an end-of-sequence token does, which can be told not to.
  lococo_sampling_params ends = {};
  ends.struct_size = sizeof ends;
  ends.temperature = 50;
  ends.ignore_eos = 1;
  const auto until = [&] {
    const Session s;
    prefill(s, tokens(5));
    return generate(s, 60, &ends);
  };
  const std::vector<int32_t> whole = until();
  CHECK_EQ(whole.size(), 60u);
  ends.stop_token_ids = &whole[9];
  ends.num_stop_token_ids = 1;
  const auto end = std::find(whole.begin(), whole.end(), whole[9]) + 1;
  CHECK(until() == std::vector<int32_t>(whole.begin(), end));

  int32_t count = -1;
  OK(lococo_session_generate(fresh, nullptr, 0, nullptr, nullptr, &count));
  CHECK_EQ(count, 0);
  const auto stop = [](int32_t, void*) { return 1; };
  const int64_t before = fresh.position();
  OK(lococo_session_generate(fresh, nullptr, 10, stop, nullptr, &count));
  CHECK_EQ(count, 1);
  CHECK_EQ(fresh.position(), before);
  params.temperature = -1;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "temperature", lococo_session_sample(fresh, &params, &first));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "temperature",
          lococo_session_generate(fresh, &params, 3, nullptr, nullptr, &count));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "max_tokens",
          lococo_session_generate(fresh, nullptr, -1, nullptr, nullptr, nullptr));
}

// reset, clone, state, save and load: the continuation is the same, bit for bit, wherever the sequence stands.
void continuing(const TempDir& dir) {
  const int block = info.block_size;
  for (const auto& [read, stepped] : {std::pair(1, 0),
                                      {block, 0},
                                      {block / 2 + 1, 0},
                                      {3 * block + 2, 0},
                                      {2 * block, 5},
                                      {info.capacity, 0},
                                      {info.capacity, 1},
                                      {4 * block, 20}}) {
    const Session s;
    prefill(s, tokens(read));
    for (int i = 0; i < stepped; ++i) OK(lococo_session_step(s, tokens(stepped, 3)[static_cast<size_t>(i)]));
    const std::vector<uint8_t> state = s.state();
    CHECK_EQ(state.size(), kHeaderBytes + info.state_bytes);
    lococo_session* copy = nullptr;
    OK(lococo_session_clone(s, &copy));
    const Session cloned(copy);
    const Session restored;
    prefill(restored, tokens(2 * block + 1, 9));  // whatever was there goes
    OK(lococo_session_state_set(restored, state.data(), state.size()));
    const Session loaded;
    const std::string path = dir / "session.state";
    OK(lococo_session_save(s, path.c_str()));
    OK(lococo_session_save(s, path.c_str()));  // replaces
    CHECK_EQ(std::filesystem::file_size(path), state.size());
    OK(lococo_session_load(loaded, path.c_str()));
    const Session again;
    prefill(again, tokens(3 * block, 4));
    OK(lococo_session_reset(again));
    prefill(again, tokens(read));
    for (int i = 0; i < stepped; ++i) OK(lococo_session_step(again, tokens(stepped, 3)[static_cast<size_t>(i)]));

    const std::vector<int32_t> next = tokens(block + info.capacity - info.mem_size + 3, 5);
    for (const Session* each : {&s, &cloned, &restored, &loaded, &again}) {
      CHECK(each->state() == state);
      CHECK_EQ(each->live(), s.live());
    }
    prefill(s, next);
    generate(s, 20);
    for (const Session* each : {&cloned, &restored, &loaded, &again}) {
      prefill(*each, next);
      generate(*each, 20);
      CHECK(each->state() == s.state());
    }
  }
}

void refusing_states(const TempDir& dir) {
  const Session s;
  prefill(s, tokens(info.block_size + 2));
  const std::vector<uint8_t> state = s.state();
  const auto set = [&](const std::vector<uint8_t>& bytes) {
    return lococo_session_state_set(s, bytes.data(), bytes.size());
  };
  const auto with = [&](size_t at, uint8_t flip) {
    std::vector<uint8_t> bytes = state;
    bytes[at] ^= flip;
    return bytes;
  };
  REFUSED(LOCOCO_ERROR_CORRUPT, "LOCOSTAT", set(with(0, 1)));
  REFUSED(LOCOCO_ERROR_VERSION, "schema version", set(with(8, 2)));
  REFUSED(LOCOCO_ERROR_CORRUPT, "header", set(with(12, 1)));
  REFUSED(LOCOCO_ERROR_STATE_MISMATCH, "bundle", set(with(16, 1)));
  REFUSED(LOCOCO_ERROR_CORRUPT, "payload", set(with(48, 1)));
  REFUSED(LOCOCO_ERROR_CORRUPT, "checksum", set(with(56, 1)));
  REFUSED(LOCOCO_ERROR_CORRUPT, "checksum", set(with(state.size() - 1, 0x80)));
  for (const size_t size : {size_t{0}, size_t{7}, size_t{87}, size_t{88}, state.size() - 1}) {
    REFUSED(LOCOCO_ERROR_CORRUPT, "cut short",
            set(std::vector<uint8_t>(state.begin(), state.begin() + static_cast<long>(size))));
  }
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "buffer", lococo_session_state_set(s, nullptr, state.size()));
  std::vector<uint8_t> longer = state;
  longer.push_back(0);
  REFUSED(LOCOCO_ERROR_CORRUPT, "expected", set(longer));
  const auto with_counts = [&](int64_t position, int64_t length) {
    std::vector<uint8_t> bytes = state;
    std::memcpy(bytes.data() + kHeaderBytes, &position, 8);
    std::memcpy(bytes.data() + kHeaderBytes + 8, &length, 8);
    reseal(bytes);
    return bytes;
  };
  const int64_t capacity = info.capacity;
  REFUSED(LOCOCO_ERROR_CORRUPT, "position", set(with_counts(-1, 0)));
  REFUSED(LOCOCO_ERROR_CORRUPT, "position", set(with_counts(int64_t{1} << 31, capacity)));
  REFUSED(LOCOCO_ERROR_CORRUPT, "live slots", set(with_counts(1'000'000, capacity + 1)));
  REFUSED(LOCOCO_ERROR_CORRUPT, "live slots", set(with_counts(1'000'000, info.mem_size - 1)));
  REFUSED(LOCOCO_ERROR_CORRUPT, "live slots", set(with_counts(0, 1)));
  REFUSED(LOCOCO_ERROR_CORRUPT, "live slots", set(with_counts(2, 1)));
  CHECK(s.state() == state);  // nothing changed

  size_t size = 0;
  OK(lococo_session_state_size(s, &size));
  std::vector<uint8_t> buffer(size);
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "size", lococo_session_state_get(s, buffer.data(), size - 1));
  const std::string path = dir / "bad.state";
  REFUSED(LOCOCO_ERROR_NOT_FOUND, "bad.state", lococo_session_load(s, path.c_str()));
  write_text(path, std::string(state.begin(), state.end() - 1));
  REFUSED(LOCOCO_ERROR_CORRUPT, "bad.state", lococo_session_load(s, path.c_str()));
  write_text(path, "short");
  REFUSED(LOCOCO_ERROR_CORRUPT, "cut short", lococo_session_load(s, path.c_str()));
  REFUSED(LOCOCO_ERROR_IO, "regular file", lococo_session_load(s, dir.path().c_str()));
  REFUSED(LOCOCO_ERROR_NOT_FOUND, "nowhere", lococo_session_save(s, (dir / "nowhere/s").c_str()));
  CHECK(s.state() == state);

  // the last position an int32 graph can take
  OK(set(with_counts((int64_t{1} << 31) - 2, info.mem_size)));
  int32_t count = 0;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "max_tokens",
          lococo_session_generate(s, nullptr, 2, nullptr, nullptr, &count));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "position", lococo_session_prefill(s, tokens(2).data(), 2, nullptr));
  OK(lococo_session_step(s, 1));
  CHECK_EQ(s.position(), (int64_t{1} << 31) - 1);
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "position", lococo_session_step(s, 1));
}

// A session is one thread's at a time; the second caller is refused, with its own error text.
void busy() {
  const Session s;
  prefill(s, tokens(4));
  const auto intrude = [](int32_t, void* user) {
    auto* session = static_cast<lococo_session*>(user);
    REFUSED(LOCOCO_ERROR_BUSY, "in use", lococo_session_step(session, 1));
    std::thread([session] {
      CHECK_EQ(std::string(lococo_last_error()), "");
      int64_t position = -1;
      REFUSED(LOCOCO_ERROR_BUSY, "in use", lococo_session_position(session, &position));
      REFUSED(LOCOCO_ERROR_BUSY, "in use", lococo_session_reset(session));
      CHECK_EQ(position, -1);
    }).join();
    lococo_session_destroy(session);  // logged and ignored
    return 0;
  };
  std::string log;
  lococo_set_log_callback(
      [](lococo_log_level, const char* text, void* user) { *static_cast<std::string*>(user) += text; }, &log);
  int32_t count = 0;
  OK(lococo_session_generate(s, nullptr, 2, intrude, s.handle, &count));
  lococo_set_log_callback(nullptr, nullptr);
  CHECK(log.find("lococo_session_destroy") != std::string::npos);
  CHECK_EQ(count, 2);
  CHECK_EQ(s.position(), 5);

  const std::vector<int32_t> ids = tokens(3 * info.block_size);  // sessions of one model in two threads
  const Session other;
  std::thread thread([&] { prefill(other, ids); });
  const Session mine;
  prefill(mine, ids);
  thread.join();
  CHECK(mine.state() == other.state());
}

// From another thread, before, during and after; what was read stays read, and the session goes on from there.
void cancelling() {
  const Session s;
  const std::vector<int32_t> ids = tokens(4 * info.block_size);
  OK(lococo_session_cancel(s, 1));
  REFUSED(LOCOCO_ERROR_CANCELLED, "position 0", lococo_session_prefill(s, ids.data(), ids.size(), nullptr));
  OK(lococo_session_cancel(s, 0));
  const std::vector<int32_t> first(ids.begin(), ids.begin() + 2 * info.block_size);
  prefill(s, first);

  // cancelled by the token callback, which runs between two forwards
  std::vector<int32_t> seen;
  std::pair<lococo_session*, std::vector<int32_t>*> both{s.handle, &seen};
  const auto cancel_third = [](int32_t id, void* user) {
    auto& [session, out] = *static_cast<decltype(both)*>(user);
    out->push_back(id);
    if (out->size() == 3) std::thread([handle = session] { OK(lococo_session_cancel(handle, 1)); }).join();
    return 0;
  };
  int32_t count = -1;
  REFUSED(LOCOCO_ERROR_CANCELLED, "cancelled", lococo_session_generate(s, nullptr, 100, cancel_third, &both, &count));
  CHECK_EQ(count, -1);
  CHECK_EQ(seen.size(), size_t{3});
  REFUSED(LOCOCO_ERROR_CANCELLED, "cancelled", lococo_session_step(s, 1));
  CHECK_EQ(s.position(), static_cast<int64_t>(first.size()) + 2);
  OK(lococo_session_cancel(s, 0));

  const Session plain;
  prefill(plain, first);
  prefill(plain, {seen[0]});
  prefill(plain, {seen[1]});
  CHECK(s.state() == plain.state());
  CHECK(generate(s, 5) == generate(plain, 5));
  OK(lococo_session_cancel(s, 1));  // after the end
  OK(lococo_session_cancel(s, 0));
  OK(lococo_session_step(s, 1));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "NULL", lococo_session_cancel(nullptr, 1));
}

// Sessions of several lengths in one batch, each against a twin that runs alone.
void batching() {
  CHECK(info.max_batch >= 3);  // scripts/ctest exports with --batch
  CHECK(info.batch_bytes > static_cast<uint64_t>(info.max_batch) * info.state_bytes);
  lococo_batch* batch = nullptr;
  OK(lococo_batch_create(model, &batch));
  lococo_batch_implementation implementation = LOCOCO_BATCH_LOOP;
  OK(lococo_batch_get_implementation(batch, &implementation));
  CHECK_EQ(implementation, LOCOCO_BATCH_GRAPH);
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "NULL", lococo_batch_get_implementation(nullptr, &implementation));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "NULL", lococo_batch_get_implementation(batch, nullptr));
  Session a;
  Session b;
  Session c;
  prefill(a, tokens(5));
  prefill(b, tokens(info.block_size + 3, 2));
  lococo_session* raw = nullptr;
  OK(lococo_session_clone(a, &raw));
  const Session alone_a(raw);
  OK(lococo_session_clone(b, &raw));
  const Session alone_b(raw);
  OK(lococo_batch_add(batch, a));
  OK(lococo_batch_add(batch, b));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "this one", lococo_batch_add(batch, a));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "none", lococo_batch_remove(batch, c));
  REFUSED(LOCOCO_ERROR_BUSY, "batch", lococo_session_step(a, 1));
  REFUSED(LOCOCO_ERROR_BUSY, "batch", lococo_session_reset(a));
  lococo_session* both[] = {a, b};
  lococo_session* strange[] = {a, c};
  lococo_session* twice[] = {a, a};
  const int32_t outside[] = {1, info.vocab_size};
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "session 1 of 2", lococo_batch_step(batch, both, outside, 2));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "session 1 of 2", lococo_batch_step(batch, strange, outside, 2));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "once", lococo_batch_step(batch, twice, outside, 2));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "at most", lococo_batch_step(batch, both, outside, 100));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "at least one", lococo_batch_step(batch, both, outside, 0));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "NULL", lococo_batch_step(batch, nullptr, outside, 1));
  CHECK_EQ(a.position(), 5);
  for (int i = 0; i < 3 * (info.capacity - info.mem_size + 1); ++i) {
    int32_t ids[2];
    int32_t expected[2];
    OK(lococo_session_sample(a, nullptr, &ids[0]));
    OK(lococo_session_sample(b, nullptr, &ids[1]));
    OK(lococo_session_sample(alone_a, nullptr, &expected[0]));
    OK(lococo_session_sample(alone_b, nullptr, &expected[1]));
    CHECK_EQ(ids[0], expected[0]);
    CHECK_EQ(ids[1], expected[1]);
    OK(lococo_session_step(alone_b, ids[1]));
    if (i % 3 == 0) {  // a rests
      OK(lococo_batch_step(batch, both + 1, ids + 1, 1));
      continue;
    }
    OK(lococo_session_step(alone_a, ids[0]));
    OK(lococo_batch_step(batch, both, ids, 2));
  }
  CHECK_EQ(a.position(), alone_a.position());
  CHECK_EQ(b.live(), alone_b.live());
  {
    Session leaves;
    prefill(leaves, tokens(2));
    OK(lococo_batch_add(batch, leaves));
    lococo_session* one[] = {leaves};
    OK(lococo_batch_step(batch, one, outside, 1));
  }  // destroyed: its row is free again
  prefill(c, tokens(1));
  OK(lococo_batch_add(batch, c));
  OK(lococo_batch_remove(batch, a));
  OK(lococo_session_step(a, 1));
  lococo_batch_destroy(batch);  // b and c go on alone
  OK(lococo_session_step(b, 1));
  OK(lococo_session_reset(c));
  lococo_batch_destroy(nullptr);
}

void dying(const TempDir& dir) {
  const Session s;
  prefill(s, tokens(4));
  std::vector<uint8_t> state = s.state();
  const std::vector<uint8_t> sound = state;
  const float nan = NAN;
  std::memcpy(state.data() + kHeaderBytes + 16 + 4, &nan, sizeof nan);  // of token 1
  reseal(state);
  OK(lococo_session_state_set(s, state.data(), state.size()));
  int32_t id = 0;
  REFUSED(LOCOCO_ERROR_BACKEND, "NaN", lococo_session_sample(s, nullptr, &id));
  CHECK_EQ(s.position(), 4);  // sample changes nothing
  REFUSED(LOCOCO_ERROR_BACKEND, "NaN", lococo_session_generate(s, nullptr, 3, nullptr, nullptr, nullptr));
  int64_t position = 0;
  REFUSED(LOCOCO_ERROR_DEAD, "reset", lococo_session_position(s, &position));
  REFUSED(LOCOCO_ERROR_DEAD, "reset", lococo_session_step(s, 1));
  REFUSED(LOCOCO_ERROR_DEAD, "reset", lococo_session_save(s, (dir / "dead").c_str()));
  OK(lococo_session_state_set(s, sound.data(), sound.size()));
  OK(lococo_session_step(s, 1));

  if (info.block_size == 1) return;
  // a block graph that goes bad after the model was opened: it is loaded when first needed
  const std::string copy = dir / "bundle";
  std::filesystem::copy(bundle, copy, std::filesystem::copy_options::recursive);
  lococo_model* broken = nullptr;
  OK(lococo_model_open(copy.c_str(), nullptr, &broken));
  write_text(copy + "/decoder_" + std::to_string(info.block_size) + ".onnx", "nonsense");
  lococo_session* handle = nullptr;
  OK(lococo_session_create(broken, &handle));
  lococo_model_close(broken);  // its sessions keep what they need
  const Session dead(handle);
  const std::vector<int32_t> ids = tokens(info.block_size);
  REFUSED(LOCOCO_ERROR_BACKEND, "decoder_", lococo_session_prefill(dead, ids.data(), ids.size(), nullptr));
  REFUSED(LOCOCO_ERROR_DEAD, "reset", lococo_session_step(dead, 1));
  OK(lococo_session_reset(dead));
  OK(lococo_session_step(dead, 1));
  lococo_model* none = nullptr;
  REFUSED(LOCOCO_ERROR_CORRUPT, "bytes", lococo_model_open(copy.c_str(), nullptr, &none));
  std::filesystem::remove(copy + "/fusion_1.onnx");
  REFUSED(LOCOCO_ERROR_NOT_FOUND, "fusion_1.onnx", lococo_model_open(copy.c_str(), nullptr, &none));
}

// Eight threads on a pool of three sessions: every sequence is what it is alone.
void pooling(const TempDir& dir) {
  lococo_pool_options options = {};
  lococo_pool* pool = nullptr;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "struct_size", lococo_pool_create(model, &options, &pool));
  options.struct_size = sizeof options;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "directory", lococo_pool_create(model, &options, &pool));
  const std::string directory = dir / "pool";
  options.directory = directory.c_str();
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "one of budget_bytes", lococo_pool_create(model, &options, &pool));
  options.budget_bytes = info.session_bytes - 1;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "one session", lococo_pool_create(model, &options, &pool));
  options.budget_bytes = 4 * info.session_bytes - 1;
  OK(lococo_pool_create(model, &options, &pool));

  constexpr int kRounds = 3;
  constexpr int kSessions = 8;
  std::vector<std::thread> threads;
  for (int t = 0; t < kSessions; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < kRounds; ++round) {
        for (int each = 0; each < kSessions; ++each) {
          lococo_session* session = nullptr;
          OK(lococo_pool_acquire(pool, std::to_string((t + each) % kSessions).c_str(), nullptr, -1, &session));
          prefill(session, tokens(5));
          OK(lococo_pool_release(pool, session));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Session alone;
  for (int i = 0; i < kRounds * kSessions; ++i) prefill(alone, tokens(5));
  lococo_session* session = nullptr;
  for (int i = 0; i < kSessions; ++i) {
    OK(lococo_pool_acquire(pool, std::to_string(i).c_str(), nullptr, 0, &session));
    CHECK(state_of(session) == alone.state());
    OK(lococo_pool_release(pool, session));
  }

  lococo_pool_info counts = {};
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "struct_size", lococo_pool_get_info(pool, &counts));
  counts.struct_size = sizeof counts;
  OK(lococo_pool_get_info(pool, &counts));
  CHECK_EQ(counts.max_sessions, 3u);
  CHECK_EQ(counts.num_idle, 3);
  CHECK_EQ(counts.num_parked, 5);
  OK(lococo_pool_flush(pool, nullptr));
  CHECK_EQ(std::filesystem::file_size(directory + "/7.state"), kHeaderBytes + info.state_bytes);
  std::string ids;
  const auto collect = [](const char* id, lococo_place place, void* user) {
    *static_cast<std::string*>(user) += std::string(id) + "amd"[place];
    return *id == '6' ? 1 : 0;
  };
  OK(lococo_pool_list(pool, collect, &ids));
  CHECK_EQ(ids, "0d1d2d3d4d5m6m");
  lococo_place place = LOCOCO_PLACE_DISK;
  OK(lococo_pool_find(pool, "7", &place));
  CHECK_EQ(place, LOCOCO_PLACE_MEMORY);
  OK(lococo_pool_remove(pool, "7"));
  REFUSED(LOCOCO_ERROR_NOT_FOUND, "\"7\"", lococo_pool_find(pool, "7", &place));

  OK(lococo_pool_acquire(pool, "from a pack", (directory + "/0.state").c_str(), 0, &session));
  std::string log;
  lococo_set_log_callback(
      [](lococo_log_level, const char* text, void* user) { *static_cast<std::string*>(user) += text; }, &log);
  lococo_session_destroy(session);  // logged and ignored, ...
  lococo_pool_destroy(pool);        // ... and so is this
  lococo_set_log_callback(nullptr, nullptr);
  CHECK(log.find("lococo_session_destroy") != std::string::npos);
  CHECK(log.find("lococo_pool_destroy") != std::string::npos);
  lococo_session* copy = nullptr;
  OK(lococo_session_clone(session, &copy));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "this pool", lococo_pool_release(pool, copy));
  const Session cloned(copy);  // not the pool's
  OK(lococo_pool_release(pool, session));
  CHECK(cloned.state() == alone.state());
  lococo_pool_destroy(pool);
  lococo_pool_destroy(nullptr);
}

void stop_strings() {
  const char* strings[] = {"</s>", "\n\n"};
  lococo_stops* stops = nullptr;
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "strings", lococo_stops_create(nullptr, 2, &stops));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "out", lococo_stops_create(strings, 2, nullptr));
  OK(lococo_stops_create(strings, 2, &stops));
  const char* out = nullptr;
  size_t size = 0;
  int32_t matched = 0;
  OK(lococo_stops_push(stops, "one\n", 4, &out, &size, &matched));
  CHECK_EQ(std::string(out, size), "one");
  CHECK_EQ(matched, -1);
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "text", lococo_stops_push(stops, nullptr, 1, &out, &size, &matched));
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "matched", lococo_stops_push(stops, "", 0, &out, &size, nullptr));
  OK(lococo_stops_push(stops, "\ntwo", 4, &out, &size, &matched));
  CHECK_EQ(size, 0u);
  CHECK_EQ(matched, 1);
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "reset", lococo_stops_push(stops, "", 0, &out, &size, &matched));
  OK(lococo_stops_reset(stops));
  OK(lococo_stops_push(stops, "</", 2, &out, &size, &matched));
  OK(lococo_stops_finish(stops, &out, &size));
  CHECK_EQ(std::string(out, size), "</");
  lococo_stops_destroy(stops);
  lococo_stops_destroy(nullptr);
  REFUSED(LOCOCO_ERROR_INVALID_ARGUMENT, "stops", lococo_stops_finish(nullptr, &out, &size));
}

}  // namespace

int main() {
  const char* directory = std::getenv("LOCOCO_TEST_BUNDLE");
  const char* library = std::getenv("LOCOCO_ONNXRUNTIME");
  if (directory == nullptr || library == nullptr) {
    std::printf("SKIP: set LOCOCO_TEST_BUNDLE to a bundle and LOCOCO_ONNXRUNTIME to libonnxruntime.so\n");
    return kSkip;
  }
  bundle = directory;
  const TempDir dir;
  opening();
  if (model != nullptr) {
    empty_session();
    reading();
    generating();
    stop_strings();
    continuing(dir);
    refusing_states(dir);
    busy();
    cancelling();
    batching();
    dying(dir);
    pooling(dir);
    lococo_model_close(model);
  }
  return finish();
}
