// The cadence against the published rule, which fuses lazily: at the start of a forward, if more than M + buffer slots
// are cached, they become M; then the new ones are appended.
#include <random>

#include "cadence.h"
#include "check.h"

using lococo::Cadence;
using lococo::Forward;

namespace {

struct Lazy {
  int mem_size;
  int buffer;
  int length = 0;
  int fusions = 0;

  void forward(int n) {
    if (length > mem_size + buffer) {
      length = mem_size;
      ++fusions;
    }
    length += n;
  }
};

std::vector<int32_t> widths(int block) {
  std::vector<int32_t> list = {1};
  if (block > 32) list.push_back(32);
  if (block > 1) list.push_back(block);
  return list;
}

// Reads prompts of these lengths one after the other; returns the cached length after each forward, before its fusion.
std::vector<int> lengths(int mem_size, int buffer, int block, const std::vector<int>& prompts) {
  const Cadence cadence(mem_size, mem_size + buffer, widths(block));
  Lazy lazy{mem_size, buffer};
  std::vector<int> result;
  int length = 0;
  int fusions = 0;
  for (const int prompt : prompts) {
    for (int left = prompt; left > 0;) {
      const Forward f = cadence.next(length, static_cast<uint64_t>(left));
      CHECK_EQ(f.n, std::min(left, block));
      CHECK(f.width >= f.n && f.width <= block);
      for (const int32_t width : widths(block)) CHECK(width >= f.width || width < f.n);  // none narrower would do
      const int fused_lazily = fusions;
      lazy.forward(f.n);
      CHECK_EQ(lazy.fusions, fused_lazily);  // the eager rule has fused whatever the lazy one fuses now
      CHECK_EQ(length + f.n, lazy.length);
      CHECK_EQ(f.fuses, lazy.length > mem_size + buffer);
      CHECK_EQ(f.after, f.fuses ? mem_size : lazy.length);
      CHECK(f.after <= mem_size + buffer);
      result.push_back(length + f.n);
      length = f.after;
      fusions += f.fuses ? 1 : 0;
      left -= f.n;
    }
  }
  return result;
}

void check_table(const std::vector<int>& got, const std::vector<int>& expected) {
  CHECK_EQ(got.size(), expected.size());
  for (size_t i = 0; i < std::min(got.size(), expected.size()); ++i) CHECK_EQ(got[i], expected[i]);
}

}  // namespace

int main() {
  check_table(lengths(512, 16, 512, {512 * 6}), {512, 1024, 1024, 1024, 1024, 1024});
  check_table(lengths(32, 16, 16, {16 * 8}), {16, 32, 48, 64, 48, 64, 48, 64});
  check_table(lengths(32, 16, 32, {32 * 4}), {32, 64, 64, 64});
  check_table(lengths(64, 16, 300, {300, 1, 1}), {300, 65, 66});  // a first block beyond the capacity is cached whole

  // single tokens: M + 1 .. M + 17, a fusion every 17 steps
  std::vector<int> expected;
  for (int step = 0; step < 100; ++step) expected.push_back(step < 64 ? step + 1 : 65 + (step - 64) % 17);
  check_table(lengths(64, 16, 64, std::vector<int>(100, 1)), expected);

  for (const int mem_size : {1, 2, 16, 17, 32, 64, 100, 512}) {
    for (const int buffer : {0, 1, 16}) {
      for (const int block : {1, 2, 15, 16, 17, 32, 33, 64, 512}) {
        for (const int base : {block, mem_size, mem_size + buffer, 3 * block, mem_size + block}) {
          for (const int delta : {-1, 0, 1}) {
            const int prompt = std::max(1, base + delta);
            lengths(mem_size, buffer, block, {prompt, 1, 1, 1, prompt, 1, prompt, prompt});
          }
        }
        lengths(mem_size, buffer, block, std::vector<int>(3 * (mem_size % 40 + 20), 1));
      }
    }
  }
  std::mt19937 random(1);
  for (int trial = 0; trial < 2000; ++trial) {
    const auto up_to = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)) + 1; };
    std::vector<int> prompts(20);
    const int block = up_to(80);
    for (int& n : prompts) n = up_to(2) == 1 ? 1 : up_to(4 * block);
    lengths(up_to(100), up_to(20) - 1, block, prompts);
  }
  return finish();
}
