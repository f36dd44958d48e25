// The pool on a backend without a model: its state is one number that follows from every token read, so that a lost,
// mixed or doubled token shows. Runs from runtime/tests, without ONNX Runtime, under every sanitizer.
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <random>
#include <set>
#include <thread>

#include "check.h"
#include "pool.h"

namespace {

std::atomic<int> write_errno{0};
std::atomic<int> num_synced{0};
std::atomic<int> num_executors{0};

}  // namespace

// Stands before the C library's: a disk that is full at will.
extern "C" ssize_t write(int fd, const void* data, size_t size) {
  if (fd > 2 && write_errno != 0) {
    errno = write_errno;
    return -1;
  }
  return syscall(SYS_write, fd, data, size);
}

// No power failure is to be survived here: a thousand real ones take longer than all the rest.
extern "C" int fsync(int) {
  ++num_synced;
  return 0;
}

namespace {

using lococo::Forward;
using lococo::Manifest;
using lococo::Model;
using lococo::Pool;
using lococo::Session;

// Exact in a float32.
float next_sum(float sum, int32_t id) {
  return static_cast<float>((static_cast<uint32_t>(sum) * 2654435761u + static_cast<uint32_t>(id) + 1) >> 9);
}

class FakeExecutor final : public lococo::Executor {
 public:
  explicit FakeExecutor(const Manifest& m) : state_(nbytes(m)), vocab_size_(static_cast<size_t>(m.vocab_size)) {
    ++num_executors;
  }
  ~FakeExecutor() override { --num_executors; }
  FakeExecutor(const FakeExecutor&) = delete;
  FakeExecutor& operator=(const FakeExecutor&) = delete;

  void forward(const Forward& f, const int32_t* ids, int64_t, int32_t, float*) override {
    std::this_thread::yield();
    float sum = *logits();
    for (int32_t i = 0; i < f.n; ++i) sum = next_sum(sum, ids[i]);
    std::memcpy(state_.data(), &sum, sizeof sum);
  }
  void append(const Forward&, int32_t) override {}
  void fuse(const Forward&, int32_t) override {}
  const float* logits() override {  // (vocab_size), the first tensor of the state
    std::memcpy(logits_, state_.data(), vocab_size_ * sizeof(float));
    return logits_;
  }
  void reset() override { std::fill(state_.begin(), state_.end(), uint8_t{0}); }
  void read_state(uint8_t* bytes) override { std::memcpy(bytes, state_.data(), state_.size()); }
  void write_state(const uint8_t* bytes) override { std::memcpy(state_.data(), bytes, state_.size()); }
  void copy_from(Executor& other) override { state_ = static_cast<FakeExecutor&>(other).state_; }

 private:
  static size_t nbytes(const Manifest& m) {  // of the state but position and past_length, its first tensors
    size_t sum = 0;
    for (size_t i = 2; i < m.state.size(); ++i) sum += m.state[i].nbytes();
    return sum;
  }

  std::vector<uint8_t> state_;
  size_t vocab_size_;
  float logits_[16] = {};
};

class FakeBackend final : public lococo::Backend {
 public:
  explicit FakeBackend(const Manifest& m) : m_(m) {}
  std::unique_ptr<lococo::Executor> create_executor() override { return std::make_unique<FakeExecutor>(m_); }
  [[nodiscard]] uint64_t executor_bytes() const override { return m_.state_bytes; }
  [[nodiscard]] const std::vector<int32_t>& widths() const override { return m_.widths; }

 private:
  const Manifest& m_;
};

std::shared_ptr<Model> make_model(bool another = false) {
  auto model = std::make_shared<Model>();
  model->manifest = lococo::read_manifest("data");
  if (another) model->manifest.bundle_digest[0] ^= 1;
  model->backend = std::make_unique<FakeBackend>(model->manifest);
  return model;
}

const std::shared_ptr<Model> model = make_model();

std::string name_of(int i) { return "chat " + std::to_string(i); }

float sum_of(Session& session) { return session.position() == 0 ? 0 : *session.logits(); }

// Reads n tokens and returns the sum that follows from `sum`.
float read_some(Session& session, float sum, int n) {
  std::vector<int32_t> ids;
  for (int i = 0; i < n; ++i) {
    ids.push_back((i * 7 + n) % 11);
    sum = next_sum(sum, ids.back());
  }
  session.prefill(ids.data(), ids.size(), nullptr);
  return sum;
}

// Acquires, reads n tokens, releases.
float visit(Pool& pool, const std::string& id, float sum, int n, const char* start = nullptr) {
  Session& session = pool.acquire(id, start, 0);
  CHECK_EQ(sum_of(session), sum);
  sum = read_some(session, sum, n);
  pool.release(session);
  return sum;
}

int count_files(const std::string& directory) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    count += entry.path().filename() != ".lock" ? 1 : 0;
  }
  return count;
}

void names() {
  std::set<std::string> seen;
  for (const std::string id : {"a", "A", "..", ".", "../../etc/passwd", "a/b", "a b", "a.state", "a.state.1-2.tmp",
                               "%41", "\xc3\xa9", "\xff", "\n", "con", "chat-1_x.y", ".lock"}) {
    const std::string name = lococo::parked_file_name(id);
    CHECK(seen.insert(name).second);
    CHECK(name.find('/') == std::string::npos && name[0] != '.');
    std::string back;
    CHECK(lococo::parse_parked_file_name(name, back));
    CHECK_EQ(back, id);
  }
  CHECK_EQ(lococo::parked_file_name("chat-1_x.y"), "chat-1_x.y.state");
  CHECK_EQ(lococo::parked_file_name("../A"), "%2E.%2F%41.state");
  CHECK_EQ(lococo::parked_file_name(std::string(200, 'a')).size(), 206u);
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("at least one"), lococo::parked_file_name(""));
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("200", "201"), lococo::parked_file_name(std::string(67, 'A')));
  std::string id;
  for (const std::string name : {"a", ".state", "a.tmp", "A.state", "%2f.state", "%61.state", "%.state", "%4.state",
                                 "%zz.state", "%00.state", ".a.state", "a.state.1-2.tmp"}) {
    CHECK(!lococo::parse_parked_file_name(name, id));
  }
}

// A thousand sessions through ten sets of buffers.
void parking() {
  const TempDir dir;
  Pool pool(model, dir / "pool", 10);
  std::vector<float> sums(1000);
  for (int round = 0; round < 2; ++round) {
    for (size_t i = 0; i < sums.size(); ++i) {
      const auto n = static_cast<int>(1 + (i + static_cast<size_t>(round)) % 9);
      sums[i] = visit(pool, name_of(static_cast<int>(i)), sums[i], n);
      CHECK(num_executors <= 10);
    }
  }
  const lococo_pool_info info = pool.info();
  CHECK_EQ(info.num_acquired, 0);
  CHECK_EQ(info.num_idle, 10);
  CHECK_EQ(info.num_parked, 990);
  CHECK_EQ(info.memory_bytes, 10 * model->session_bytes());
  CHECK_EQ(info.parks, 1990);
  CHECK_EQ(num_synced, 2 * 1990);  // the file and its directory
  CHECK_EQ(info.resumes, 1000);
  const auto list = pool.list();
  CHECK_EQ(list.size(), 1000u);
  CHECK_EQ(list.front().first, name_of(0));  // the least recently used
  CHECK_EQ(list.front().second, LOCOCO_PLACE_DISK);
  CHECK_EQ(list.back().first, name_of(999));
  CHECK_EQ(list.back().second, LOCOCO_PLACE_MEMORY);
}

void refusing() {
  const TempDir dir;
  Pool pool(model, dir / "pool", 2);
  Session& a = pool.acquire("a", nullptr, 0);
  CHECK_ERROR(LOCOCO_ERROR_BUSY, ("\"a\"", "release it"), pool.acquire("a", nullptr, 0));
  CHECK_ERROR(LOCOCO_ERROR_BUSY, ("\"a\""), pool.acquire("a", nullptr, 20));
  CHECK_ERROR(LOCOCO_ERROR_BUSY, ("\"a\"", "release it"), pool.remove("a"));
  CHECK_ERROR(LOCOCO_ERROR_BUSY, ("\"a\"", "release it"), pool.flush("a"));
  Session& b = pool.acquire("b", nullptr, 0);
  CHECK_ERROR(LOCOCO_ERROR_POOL_FULL, ("all 2 sessions", "budget"), pool.acquire("c", nullptr, 0));
  CHECK_ERROR(LOCOCO_ERROR_POOL_FULL, ("all 2 sessions"), pool.acquire("c", nullptr, 20));
  CHECK_EQ(pool.list().size(), 2u);
  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("\"c\""), pool.remove("c"));
  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("\"c\""), pool.flush("c"));

  const float sum = read_some(a, 0, 5);
  std::thread other([&] {  // waits for the session, then for any
    Session& again = pool.acquire("a", nullptr, -1);
    CHECK_EQ(sum_of(again), sum);
    pool.release(again);
    Session& c = pool.acquire("c", nullptr, 60'000);
    CHECK_EQ(c.position(), 0);
    pool.release(c);
    pool.remove("c");
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  b.busy = true;  // a thread is inside
  CHECK_ERROR(LOCOCO_ERROR_BUSY, ("\"b\"", "another thread"), pool.release(b));
  b.busy = false;
  pool.release(a);
  other.join();  // which had the buffers of `a`
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("not released yet"), pool.release(a));
  Session own(model);
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("from this pool"), pool.release(own));
  CHECK_EQ(pool.list().size(), 2u);
  CHECK_EQ(b.position(), 0);
  pool.release(b);

  CHECK_ERROR(LOCOCO_ERROR_BUSY, ("in use by another pool"), Pool(model, dir / "pool", 1));
  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("nowhere/pool"), Pool(model, dir / "nowhere/pool", 1));
  write_text(dir / "file", "");
  CHECK_ERROR(LOCOCO_ERROR_IO, ("file"), Pool(model, dir / "file", 1));
}

// A full disk loses nothing; what is on disk already can still make room.
void full_disk() {
  const TempDir dir;
  Pool pool(model, dir / "pool", 2);
  const float a = visit(pool, "a", 0, 3);
  const float b = visit(pool, "b", 0, 4);
  write_errno = ENOSPC;
  CHECK_ERROR(LOCOCO_ERROR_NO_SPACE, ("a.state", "free some space"), pool.acquire("c", nullptr, 0));
  CHECK_ERROR(LOCOCO_ERROR_NO_SPACE, ("a.state"), pool.flush("a"));
  CHECK_ERROR(LOCOCO_ERROR_NO_SPACE, (".state"), pool.flush_all());
  CHECK_EQ(pool.list().size(), 2u);
  CHECK_EQ(pool.info().num_idle, 2);
  CHECK_EQ(count_files(dir / "pool"), 0);
  visit(pool, "a", a, 1);
  write_errno = 0;
  pool.flush("b");
  CHECK_EQ(count_files(dir / "pool"), 1);
  write_errno = ENOSPC;
  const float c = visit(pool, "c", 0, 5);  // where b was, which is on disk
  CHECK_ERROR(LOCOCO_ERROR_NO_SPACE, ("a.state"), pool.acquire("b", nullptr, 0));
  CHECK_EQ(pool.list().size(), 3u);
  write_errno = 0;
  visit(pool, "b", b, 1);
  visit(pool, "c", c, 1);
}

void restarting() {
  const TempDir dir;
  const std::string path = dir / "pool";
  const std::string pack = dir / "pack";
  float parked = 0;
  float flushed = 0;
  {
    Pool pool(model, path, 1);
    parked = visit(pool, "../parked", 0, 5);
    flushed = visit(pool, "flushed", 0, 6);
    pool.flush("flushed");
    visit(pool, "flushed", flushed, 1);  // after the flush: lost by a crash
    Session& session = pool.acquire("flushed", nullptr, 0);
    session.save(pack);
    pool.release(session);
  }
  CHECK_EQ(num_executors, 0);
  write_text(path + "/parked.state.12-3.tmp", "half");
  write_text(path + "/README", "not ours");
  write_text(path + "/%zz.state", "not ours");
  std::filesystem::create_directory(path + "/folder.state");
  write_text(path + "/damaged.state", "LOCOSTAT");
  {
    Pool pool(model, path, 2);
    CHECK_EQ(pool.list().size(), 3u);
    CHECK(!std::filesystem::exists(path + "/parked.state.12-3.tmp"));
    CHECK(std::filesystem::exists(path + "/README"));
    CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("damaged.state", "cut short"), pool.acquire("damaged", nullptr, 0));
    CHECK_EQ(pool.list().size(), 3u);
    pool.remove("damaged");
    CHECK(!std::filesystem::exists(path + "/damaged.state"));
    parked = visit(pool, "../parked", parked, 2);
    flushed = visit(pool, "flushed", flushed, 2, "/nowhere");  // known: `start` is not read
    CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("/nowhere"), pool.acquire("new", "/nowhere", 0));
    CHECK_EQ(pool.list().size(), 2u);
    Session& session = pool.acquire("new", pack.c_str(), 0);
    CHECK_EQ(session.position(), 7);
    pool.release(session);
    visit(pool, "damaged", 0, 1);  // a new one
    pool.flush_all();
    pool.remove("new");
  }
  {
    Pool pool(make_model(true), path, 1);  // another bundle
    CHECK_ERROR(LOCOCO_ERROR_STATE_MISMATCH, ("flushed.state", "bundle"), pool.acquire("flushed", nullptr, 0));
    CHECK_ERROR(LOCOCO_ERROR_STATE_MISMATCH, ("pack", "bundle"), pool.acquire("other", pack.c_str(), 0));
    visit(pool, "other", 0, 1);
    pool.remove("damaged");
  }
  Pool pool(model, path, 1);
  CHECK_EQ(pool.list().size(), 2u);  // "other" was neither flushed nor parked
  visit(pool, "../parked", parked, 1);
  visit(pool, "flushed", flushed, 1);
  std::filesystem::remove(path + "/%2E.%2Fparked.state");  // behind the pool's back
  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("%2E.%2Fparked.state"), pool.acquire("../parked", nullptr, 0));
  pool.remove("../parked");
}

void dying() {
  const TempDir dir;
  Pool pool(model, dir / "pool", 1);
  const float sum = visit(pool, "a", 0, 3);
  pool.flush("a");
  Session& a = pool.acquire("a", nullptr, 0);
  read_some(a, sum, 2);
  a.dead = true;
  pool.release(a);
  visit(pool, "a", sum, 1);  // as it was flushed
  Session& b = pool.acquire("b", nullptr, 0);
  b.dead = true;
  pool.release(b);
  CHECK_EQ(pool.list().size(), 1u);
  visit(pool, "b", 0, 1);
  CHECK_EQ(pool.info().memory_bytes, model->session_bytes());
}

// What a session has read is kept beside the pool without a lock: being acquired has to be lock enough.
void threads() {
  constexpr int kIds = 30;
  const TempDir dir;
  std::vector<float> sums(kIds);
  {
    Pool pool(model, dir / "pool", 6);
    std::atomic<int> visits{0};
    const auto work = [&](unsigned seed) {
      std::mt19937 random(seed);
      for (int i = 0; i < 250; ++i) {
        const auto pick = random() % kIds;
        const std::string id = name_of(static_cast<int>(pick));
        const auto what = random() % 20;
        try {
          if (what == 0) {
            pool.flush_all();
          } else if (what == 1) {
            pool.flush(id);
          } else if (what == 2) {
            CHECK(pool.list().size() <= kIds);
          } else if (what == 3) {
            CHECK(pool.info().memory_bytes <= 6 * model->session_bytes());
          } else {
            Session& session = pool.acquire(id, nullptr, what < 8 ? 0 : what < 12 ? 1 : -1);
            CHECK_EQ(sum_of(session), sums[pick]);
            if (what == 19) {
              sums[pick] = 0;
              session.reset();
            }
            sums[pick] = read_some(session, sums[pick], 1 + static_cast<int>(random() % 5));
            pool.release(session);
            ++visits;
          }
        } catch (const lococo::Error& e) {
          CHECK(e.status() == LOCOCO_ERROR_BUSY || e.status() == LOCOCO_ERROR_POOL_FULL ||
                (what == 1 && e.status() == LOCOCO_ERROR_NOT_FOUND));
        }
      }
    };
    std::vector<std::thread> all;
    for (unsigned seed = 0; seed < 8; ++seed) all.emplace_back(work, seed);
    for (std::thread& thread : all) thread.join();
    CHECK(visits > 800);
    CHECK(pool.info().parks > 100);
    pool.flush_all();
  }
  Pool pool(model, dir / "pool", 3);
  for (int i = 0; i < kIds; ++i) visit(pool, name_of(i), sums[static_cast<size_t>(i)], 1);
  for (int i = 0; i < kIds; ++i) pool.remove(name_of(i));
  CHECK_EQ(count_files(dir / "pool"), 0);
}

}  // namespace

int main() {
  names();
  parking();
  refusing();
  full_disk();
  restarting();
  dying();
  threads();
  return finish();
}
