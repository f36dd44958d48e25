// memory.h - where a backend's tensors lie: in host memory, or on a CUDA device.
#pragma once

#include <cstdint>
#include <memory>

#include "cuda_driver.h"

namespace lococo {

// Rows of bytes, one stride after the other.
template <typename T>
struct Rows {
  T* data;
  uint64_t stride;
};

class Memory {
 public:
  // While it lives, the device is the calling thread's current one; then the caller's own comes back.
  class Scope {
   public:
    explicit Scope(const Memory& memory) : memory_(memory) { memory_.enter(); }
    ~Scope() { memory_.leave(); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const Memory& memory_;
  };

  Memory() = default;
  virtual ~Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  [[nodiscard]] virtual bool on_host() const = 0;
  // Zeroed. OUT_OF_MEMORY.
  [[nodiscard]] virtual void* allocate(uint64_t nbytes) const = 0;
  virtual void free(void* data) const noexcept = 0;

  // What one thread asks for is done in order, perhaps after the call has returned: finish waits. Either side of a copy
  // may be host memory, too: what was there has been read when the call returns, what comes is there after finish.
  virtual void zero(void* to, uint64_t nbytes) const = 0;
  virtual void copy(void* to, const void* from, uint64_t nbytes) const = 0;
  // Within this memory.
  virtual void copy_rows(Rows<void> to, Rows<const void> from, uint64_t row_bytes, uint64_t num_rows) const = 0;
  virtual void finish() const = 0;

 private:
  virtual void enter() const {}
  virtual void leave() const noexcept {}
};

std::unique_ptr<Memory> make_host_memory();

// UNSUPPORTED: the device is in no state to be used.
std::unique_ptr<Memory> make_cuda_memory(const CudaDevice& device);

// Zeroed, aligned memory that goes with the object.
class Arena {
 public:
  static constexpr uint64_t kAlignment = 64;  // a cache line, and the widest vector loads

  Arena(const Memory& memory, uint64_t nbytes);
  // What an arena allocates.
  static uint64_t nbytes(uint64_t nbytes) { return nbytes + kAlignment; }
  // Adds a tensor to an arena that ends at `end`; returns its offset.
  static uint64_t take(uint64_t& end, uint64_t nbytes);

  [[nodiscard]] uint8_t* data() const { return data_; }

 private:
  struct Free {
    const Memory* memory;
    void operator()(void* data) const { memory->free(data); }
  };

  std::unique_ptr<void, Free> memory_;
  uint8_t* data_ = nullptr;
};

}  // namespace lococo
