// Host memory and a device's, the latter on a stand-in for the driver: the same calls leave the same bytes.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#include "check.h"
#include "memory.h"

namespace {

using namespace lococo;

void copies(const Memory& memory) {
  Arena arena(memory, 100);
  CHECK_EQ(reinterpret_cast<uintptr_t>(arena.data()) % Arena::kAlignment, 0u);
  std::vector<uint8_t> bytes(100, 1);
  const auto read = [&] {
    memory.copy(bytes.data(), arena.data(), bytes.size());
    memory.finish();
  };
  read();
  CHECK(bytes == std::vector<uint8_t>(100, 0));

  std::vector<uint8_t> expected(100);
  std::iota(expected.begin(), expected.end(), uint8_t{0});
  memory.copy(arena.data(), expected.data(), 100);
  read();
  CHECK(bytes == expected);

  memory.copy_rows({arena.data() + 50, 10}, {arena.data() + 1, 7}, 3, 4);
  memory.copy_rows({arena.data(), 10}, {arena.data() + 40, 7}, 0, 4);  // of no bytes
  for (size_t row = 0; row < 4; ++row) std::copy_n(&expected[1 + 7 * row], 3, &expected[50 + 10 * row]);
  read();
  CHECK(bytes == expected);

  memory.zero(arena.data() + 5, 20);
  std::fill_n(&expected[5], 20, uint8_t{0});
  read();
  CHECK(bytes == expected);
}

void layout() {
  uint64_t end = 0;
  CHECK_EQ(Arena::take(end, 1), 0u);
  CHECK_EQ(Arena::take(end, 64), 64u);
  CHECK_EQ(Arena::take(end, 65), 128u);
  CHECK_EQ(end, 256u);
}

void failures(const Memory& memory) {
  setenv("FAKE_CUDA", "no memory", 1);
  CHECK_ERROR(LOCOCO_ERROR_OUT_OF_MEMORY, ("1064 bytes", "1000 of 2000 are free"), Arena(memory, 1000));
  setenv("FAKE_CUDA", "dying", 1);
  CHECK_ERROR(LOCOCO_ERROR_BACKEND, ("700"), memory.finish());
  CHECK_ERROR(LOCOCO_ERROR_BACKEND, ("700"), Arena(memory, 10));
  unsetenv("FAKE_CUDA");
  memory.finish();
}

}  // namespace

int main() {
  layout();
  const std::unique_ptr<Memory> host = make_host_memory();
  CHECK(host->on_host());
  copies(*host);
  CudaDriver driver;  // loads the stand-in
  const std::unique_ptr<Memory> device = make_cuda_memory(query_cuda_device(0));
  CHECK(!device->on_host());
  const auto current = [&] {
    void* context = nullptr;
    CHECK_EQ(driver.function<int(void**)>("cuCtxGetCurrent")(&context), 0);
    return context;
  };
  copies(*device);
  failures(*device);
  CHECK(current() == nullptr);
  int mine = 0;  // whatever the caller's context is, it comes back
  CHECK_EQ(driver.function<int(void*)>("cuCtxPushCurrent_v2")(&mine), 0);
  copies(*device);
  CHECK(current() == &mine);
  {
    const Memory::Scope scope(*device);
    CHECK(current() != &mine);
  }
  CHECK(current() == &mine);
  return finish();
}
