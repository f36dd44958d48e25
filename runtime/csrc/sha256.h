// sha256.h - SHA-256 (FIPS 180-4), with the CPU's SHA instructions where it has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace lococo {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  enum class Path { kPortable, kHardware };

  // The fastest path this CPU has.
  static Path best_path();

  explicit Sha256(Path path = best_path());
  void update(const void* data, size_t size);
  Digest digest();  // ends the message; the object is spent

 private:
  using Compress = void (*)(uint32_t state[8], const uint8_t* blocks, size_t num_blocks);

  Compress compress_;
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,  // FIPS 180-4, 5.3.3
                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint64_t total_bytes_ = 0;
  uint8_t pending_[64] = {};
  size_t num_pending_ = 0;
};

std::string to_hex(const Digest& digest);

// False if text is not 64 lower-case hex digits.
bool from_hex(const std::string& text, Digest& digest);

}  // namespace lococo
