// State files, read into a session over memory alone. The first byte says what is repaired, so that not every mutation
// ends at the checksum: bit 0 puts a right header in front of what follows, bit 1 corrects the checksum.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "fuzz.h"
#include "session.h"
#include "state_file.h"

namespace {

class MemoryExecutor : public lococo::Executor {
 public:
  explicit MemoryExecutor(const lococo::Manifest& m) : m_(m) {
    uint64_t bytes = 0;
    for (const lococo::TensorSpec& t : m.state) bytes += t.nbytes();
    state_.resize(bytes - 16);  // less position and past_length
  }

  void forward(const lococo::Forward& f, const int32_t* /*ids*/, int64_t position, int32_t length,
               float* /*all_logits*/) override {
    REQUIRE(position >= 0 && length >= 0 && length <= m_.capacity && f.n >= 1);
  }
  void append(const lococo::Forward& f, int32_t length) override { REQUIRE(length + f.n <= m_.capacity); }
  void fuse(const lococo::Forward& f, int32_t length) override { REQUIRE(length + f.n > m_.capacity); }
  const float* logits() override { return reinterpret_cast<const float*>(state_.data()); }
  void reset() override { std::fill(state_.begin(), state_.end(), uint8_t{0}); }
  void read_state(uint8_t* bytes) override { std::memcpy(bytes, state_.data(), state_.size()); }
  void write_state(const uint8_t* bytes) override { std::memcpy(state_.data(), bytes, state_.size()); }
  void copy_from(lococo::Executor& other) override { state_ = static_cast<MemoryExecutor&>(other).state_; }

 private:
  const lococo::Manifest& m_;
  std::vector<uint8_t> state_;
};

class MemoryBackend : public lococo::Backend {
 public:
  explicit MemoryBackend(const lococo::Manifest& m) : m_(m) {}
  std::unique_ptr<lococo::Executor> create_executor() override { return std::make_unique<MemoryExecutor>(m_); }
  [[nodiscard]] uint64_t executor_bytes() const override { return 0; }
  [[nodiscard]] const std::vector<int32_t>& widths() const override { return m_.widths; }

 private:
  const lococo::Manifest& m_;
};

const std::shared_ptr<lococo::Model>& model() {
  static const std::shared_ptr<lococo::Model> made = [] {
    auto m = std::make_shared<lococo::Model>();
    m->manifest = lococo::read_manifest(LOCOCO_TEST_DATA);
    m->backend = std::make_unique<MemoryBackend>(m->manifest);
    return m;
  }();
  return made;
}

std::vector<uint8_t> state_of(lococo::Session& session) {
  std::vector<uint8_t> state(session.state_size());
  session.state_get(state.data());
  return state;
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const lococo::Manifest& m = model()->manifest;
  const uint8_t repair = size > 0 ? data[0] : 0;
  std::vector<uint8_t> state(data + (size > 0 ? 1 : 0), data + size);
  if ((repair & 1) != 0) {
    std::vector<uint8_t> whole(lococo::kStateHeaderBytes + m.state_bytes);
    std::copy_n(state.begin(), std::min<size_t>(state.size(), m.state_bytes),
                whole.begin() + lococo::kStateHeaderBytes);
    lococo::seal_state(m, whole.data());
    state = std::move(whole);
  } else if ((repair & 2) != 0 && state.size() == lococo::kStateHeaderBytes + m.state_bytes) {
    std::vector<uint8_t> sealed = state;
    lococo::seal_state(m, sealed.data());
    std::copy_n(sealed.begin() + 56, 32, state.begin() + 56);  // right if the header was
  }

  lococo::Session session(model());
  session.prefill(std::vector<int32_t>{1, 2, 3, 4, 5}.data(), 5, nullptr);
  const std::vector<uint8_t> before = state_of(session);
  const Outcome set = outcome_of([&] { session.state_set(state.data(), state.size()); });
  const std::vector<uint8_t> after = state_of(session);
  if (set.status != LOCOCO_OK) REQUIRE(after == before);  // a refused state changes nothing

  const std::string path = scratch() + "/state.lococo";
  write_text(path, std::string(state.begin(), state.end()));
  lococo::Session other(model());
  const Outcome loaded = outcome_of([&] { other.load(path); });
  REQUIRE(loaded.status == set.status);
  if (set.status != LOCOCO_OK) return 0;

  REQUIRE(state_of(other) == after);
  other.state_set(after.data(), after.size());  // what was given out is taken back
  REQUIRE(state_of(other) == after);
  for (int32_t i = 0; i < 2 * m.capacity; ++i) {
    (void)outcome_of([&] { session.step(i % m.vocab_size); });  // refused at the last position
    REQUIRE(session.live_slots() <= m.capacity);
  }
  return 0;
}
