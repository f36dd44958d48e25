#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "error.h"

namespace lococo {
namespace {

class HostMemory final : public Memory {
 public:
  [[nodiscard]] bool on_host() const override { return true; }
  // Pages that calloc takes from the system are zero, and cost nothing until they are used.
  [[nodiscard]] void* allocate(uint64_t nbytes) const override {
    void* data = std::calloc(nbytes, 1);
    if (data == nullptr) throw std::bad_alloc();
    return data;
  }
  void free(void* data) const noexcept override { std::free(data); }
  void zero(void* to, uint64_t nbytes) const override { std::memset(to, 0, nbytes); }
  void copy(void* to, const void* from, uint64_t nbytes) const override { std::memcpy(to, from, nbytes); }
  void copy_rows(Rows<void> to, Rows<const void> from, uint64_t row_bytes, uint64_t num_rows) const override {
    for (uint64_t i = 0; i < num_rows; ++i) {
      std::memcpy(static_cast<uint8_t*>(to.data) + i * to.stride,
                  static_cast<const uint8_t*>(from.data) + i * from.stride, row_bytes);
    }
  }
  void finish() const override {}
};

// --- CUDA ------------------------------------------------------------------------------------------------------------

// Of the driver's ABI, where an address on the device is an integer as wide as a pointer.
static_assert(sizeof(void*) == sizeof(unsigned long long));
using Context = void*;
using Stream = void*;
struct Copy2D {  // CUDA_MEMCPY2D
  size_t from_x = 0, from_y = 0;
  int from_type = 0;
  const void* from_host = nullptr;
  const void* from = nullptr;
  void* from_array = nullptr;
  size_t from_stride = 0;
  size_t to_x = 0, to_y = 0;
  int to_type = 0;
  void* to_host = nullptr;
  void* to = nullptr;
  void* to_array = nullptr;
  size_t to_stride = 0;
  size_t row_bytes = 0, num_rows = 0;
};
constexpr int kOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY
constexpr int kOnDevice = 2;     // CU_MEMORYTYPE_DEVICE

// In the device's primary context, which ONNX Runtime uses too, and in the calling thread's own default stream.
class CudaMemory final : public Memory {
 public:
  explicit CudaMemory(const CudaDevice& device) {
    driver_.check(driver_.function<int(int*, int)>("cuDeviceGet")(&device_, device.index), "cuDeviceGet");
    driver_.check(driver_.function<int(Context*, int)>("cuDevicePrimaryCtxRetain")(&context_, device_),
                  "cuDevicePrimaryCtxRetain");
  }
  ~CudaMemory() override { (void)driver_.function<int(int)>("cuDevicePrimaryCtxRelease_v2")(device_); }

  [[nodiscard]] bool on_host() const override { return false; }

  [[nodiscard]] void* allocate(uint64_t nbytes) const override {
    const Scope scope(*this);
    void* data = nullptr;
    const int code = allocate_(&data, nbytes);
    if (code == kOutOfMemory) {
      size_t free_bytes = 0;
      size_t total_bytes = 0;
      check(driver_.function<int(size_t*, size_t*)>("cuMemGetInfo_v2")(&free_bytes, &total_bytes),
            "ask for free memory");
      fail(LOCOCO_ERROR_OUT_OF_MEMORY,
           "device memory: expected %llu bytes, %zu of %zu are free; close sessions and other programs on the GPU",
           static_cast<unsigned long long>(nbytes), free_bytes, total_bytes);
    }
    check(code, "allocate");
    try {
      zero(data, nbytes);
      finish();
    } catch (...) {
      free(data);
      throw;
    }
    return data;
  }

  void free(void* data) const noexcept override {
    try {
      const Scope scope(*this);
      check(free_(data), "free memory");  // waits for what runs
    } catch (const std::exception& e) {
      log_line(LOCOCO_LOG_ERROR, e.what());
    }
  }

  void zero(void* to, uint64_t nbytes) const override {
    const Scope scope(*this);
    check(set_(to, 0, nbytes, kStream), "clear memory");
  }

  void copy(void* to, const void* from, uint64_t nbytes) const override {
    const Scope scope(*this);
    check(copy_(to, from, nbytes, kStream), "copy memory");
  }

  void copy_rows(Rows<void> to, Rows<const void> from, uint64_t row_bytes, uint64_t num_rows) const override {
    if (row_bytes == 0) return;
    Copy2D c;
    c.from_type = c.to_type = kOnDevice;
    c.from = from.data;
    c.from_stride = from.stride;
    c.to = to.data;
    c.to_stride = to.stride;
    c.row_bytes = row_bytes;
    c.num_rows = num_rows;
    const Scope scope(*this);
    check(copy_2d_(&c, kStream), "copy memory");
  }

  void finish() const override {
    const Scope scope(*this);
    check(synchronize_(kStream), "finish");
  }

 private:
  static inline Stream const kStream = reinterpret_cast<Stream>(2);  // CU_STREAM_PER_THREAD

  void enter() const override { check(push_(context_), "select the device"); }
  void leave() const noexcept override {
    Context context = nullptr;
    (void)pop_(&context);
  }

  void check(int code, const char* action) const {
    if (code == 0) return;
    fail(code == kOutOfMemory ? LOCOCO_ERROR_OUT_OF_MEMORY : LOCOCO_ERROR_BACKEND, "CUDA: cannot %s: %s", action,
         driver_.error_text(code).c_str());
  }

  const CudaDriver driver_;
  int device_ = 0;
  Context context_ = nullptr;
  int (*const push_)(Context) = driver_.function<int(Context)>("cuCtxPushCurrent_v2");
  int (*const pop_)(Context*) = driver_.function<int(Context*)>("cuCtxPopCurrent_v2");
  int (*const allocate_)(void**, size_t) = driver_.function<int(void**, size_t)>("cuMemAlloc_v2");
  int (*const free_)(void*) = driver_.function<int(void*)>("cuMemFree_v2");
  int (*const set_)(void*, unsigned char, size_t,
                    Stream) = driver_.function<int(void*, unsigned char, size_t, Stream)>("cuMemsetD8Async");
  int (*const copy_)(void*, const void*, size_t,
                     Stream) = driver_.function<int(void*, const void*, size_t, Stream)>("cuMemcpyAsync");
  int (*const copy_2d_)(const Copy2D*, Stream) = driver_.function<int(const Copy2D*, Stream)>("cuMemcpy2DAsync_v2");
  int (*const synchronize_)(Stream) = driver_.function<int(Stream)>("cuStreamSynchronize");
};

}  // namespace

std::unique_ptr<Memory> make_host_memory() { return std::make_unique<HostMemory>(); }

std::unique_ptr<Memory> make_cuda_memory(const CudaDevice& device) { return std::make_unique<CudaMemory>(device); }

Arena::Arena(const Memory& memory, uint64_t nbytes) : memory_(memory.allocate(Arena::nbytes(nbytes)), Free{&memory}) {
  void* data = memory_.get();
  size_t space = 2 * kAlignment;
  data_ = static_cast<uint8_t*>(std::align(kAlignment, kAlignment, data, space));
}

uint64_t Arena::take(uint64_t& end, uint64_t nbytes) {
  const uint64_t offset = end;
  end += (nbytes + kAlignment - 1) / kAlignment * kAlignment;
  return offset;
}

}  // namespace lococo
