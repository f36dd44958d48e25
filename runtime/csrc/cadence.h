// cadence.h - when to run which graph, and when to fuse: pure logic, no state of its own.
//
// A forward of n tokens appends n slots to the L live ones. When that leaves more than C = M + buffer, a fusion follows
// at once and leaves M. The published code fuses lazily, at the start of the next forward; no attention lies between
// the two moments, so the numbers are the same, and at most C slots are ever live between calls.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace lococo {

struct Forward {
  int32_t n;      // tokens read
  int32_t width;  // of the graph that reads them; the last width - n are padding
  bool fuses;     // a fusion follows
  int32_t after;  // live slots at the end
};

class Cadence {
 public:
  // widths: of the decoder graphs, ascending, from 1 to block_size.
  Cadence(int32_t mem_size, int32_t capacity, std::vector<int32_t> widths)
      : mem_size_(mem_size), capacity_(capacity), widths_(std::move(widths)) {}

  [[nodiscard]] int32_t block_size() const { return widths_.back(); }

  // The next forward with `length` live slots and `left` >= 1 tokens to read.
  [[nodiscard]] Forward next(int32_t length, uint64_t left) const {
    const auto n = static_cast<int32_t>(std::min<uint64_t>(left, static_cast<uint64_t>(block_size())));
    const int32_t width = *std::lower_bound(widths_.begin(), widths_.end(), n);
    const bool fuses = length + n > capacity_;
    return {n, width, fuses, fuses ? mem_size_ : length + n};
  }

 private:
  int32_t mem_size_;
  int32_t capacity_;
  std::vector<int32_t> widths_;
};

}  // namespace lococo
