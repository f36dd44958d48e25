#include <algorithm>

#include "trt/kernels.h"

namespace lococo::trt {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1024;
constexpr int kChooserThreads = 256;
constexpr int kLogitsPerBlock = 4 * kChooserThreads;
constexpr int kMaxChooserBlocks = 128;

int blocks_for(uint64_t items) {
  return static_cast<int>(std::max<uint64_t>(1, std::min<uint64_t>(kMaxBlocks, (items + kThreads - 1) / kThreads)));
}

// L and n come from memory, not from the launch: the launch is captured once and replayed at every L.
template <typename Word>
__global__ void append_columns_kernel(Columns c, Cursor cursor) {
  const int length = *cursor.past_length;
  const int n = *cursor.num_tokens;
  const int words = c.column_bytes / static_cast<int>(sizeof(Word));
  const int per_head = n * words;
  const int per_tensor = c.num_heads * per_head;
  const int64_t total = static_cast<int64_t>(c.num_tensors) * per_tensor;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int tensor = static_cast<int>(i / per_tensor);
    const int rest = static_cast<int>(i % per_tensor);
    const int head = rest / per_head;
    const int word = rest % per_head;  // the n columns of a head are contiguous on both sides
    auto* to = reinterpret_cast<Word*>(c.state + tensor * c.state_stride);
    const auto* from = reinterpret_cast<const Word*>(c.fresh + tensor * c.fresh_stride);
    to[(static_cast<int64_t>(head) * c.capacity + length) * words + word] =
        from[static_cast<int64_t>(head) * c.width * words + word];
  }
}

__global__ void append_scores_kernel(Scores s, Cursor cursor) {
  const int length = *cursor.past_length;
  const int live = length + *cursor.num_tokens;  // at most C
  const int rows = s.num_layers * s.num_heads;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int layer = row / s.num_heads;
    const int head = row % s.num_heads;
    float* to = s.state + layer * s.state_stride + static_cast<int64_t>(head) * s.capacity;
    const float* from = s.fresh + layer * s.fresh_stride + static_cast<int64_t>(head) * (s.capacity + s.width);
    for (int column = threadIdx.x; column < live; column += blockDim.x) {
      to[column] = from[column < length ? column : s.capacity + column - length];
    }
  }
}

constexpr unsigned long long kUnsound = ~0ull;  // a NaN or +inf was seen

// Orders as (logit, then lower id); 0 is below every logit.
__device__ unsigned long long key_of(float logit, int id) {
  if (isnan(logit) || logit == INFINITY) return kUnsound;
  const unsigned bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);  // -0 equals 0
  const unsigned ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | ~static_cast<unsigned>(id);
}

// Every block takes its maximum, atomicMax joins them: the result does not depend on their order.
__global__ void choose_token_kernel(const float* logits, int vocab_size, Chooser* chooser, int32_t* ring,
                                    Cursor cursor) {
  unsigned long long best = 0;
  for (int id = blockIdx.x * blockDim.x + threadIdx.x; id < vocab_size; id += gridDim.x * blockDim.x) {
    best = max(best, key_of(logits[id], id));
  }
  for (int offset = 16; offset > 0; offset /= 2) best = max(best, __shfl_down_sync(0xffffffffu, best, offset));
  __shared__ unsigned long long warps[kChooserThreads / 32];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kChooserThreads / 32; ++i) best = max(best, warps[i]);
  atomicMax(&chooser->best, best);
  __threadfence();
  if (atomicAdd(&chooser->blocks_done, 1u) != gridDim.x - 1) return;

  __threadfence();
  best = atomicExch(&chooser->best, 0ull);
  chooser->blocks_done = 0;
  constexpr unsigned kMinusInfinity = ~0xff800000u;  // as key_of orders it
  const bool sound = best != kUnsound && best >> 32 != kMinusInfinity;
  const int token = sound ? static_cast<int>(~static_cast<unsigned>(best)) : -1;
  ring[chooser->index] = token;
  *cursor.input_ids = sound ? token : 0;  // the rest of the window is thrown away, but must not read out of bounds
  if (chooser->index > 0) {
    ++*cursor.position;
    ++*cursor.past_length;
  }
  ++chooser->index;
}

}  // namespace

cudaError_t append_columns(const Columns& c, const Cursor& cursor, cudaStream_t stream) {
  // The widest word that divides a column; the tensors lie at multiples of 256 bytes.
  const bool wide = c.column_bytes % sizeof(uint4) == 0;
  const uint64_t words = static_cast<uint64_t>(c.num_tensors) * c.num_heads * c.width *
                         (c.column_bytes / (wide ? sizeof(uint4) : sizeof(uint32_t)));
  if (wide) {
    append_columns_kernel<uint4><<<blocks_for(words), kThreads, 0, stream>>>(c, cursor);
  } else {
    append_columns_kernel<uint32_t><<<blocks_for(words), kThreads, 0, stream>>>(c, cursor);
  }
  return cudaGetLastError();
}

cudaError_t append_scores(const Scores& s, const Cursor& cursor, cudaStream_t stream) {
  const int rows = std::min(kMaxBlocks, s.num_layers * s.num_heads);
  append_scores_kernel<<<rows, kThreads, 0, stream>>>(s, cursor);
  return cudaGetLastError();
}

cudaError_t choose_token(const float* logits, int32_t vocab_size, Chooser* chooser, int32_t* ring, const Cursor& cursor,
                         cudaStream_t stream) {
  const int blocks = std::min(kMaxChooserBlocks, (vocab_size + kLogitsPerBlock - 1) / kLogitsPerBlock);
  choose_token_kernel<<<blocks, kChooserThreads, 0, stream>>>(logits, vocab_size, chooser, ring, cursor);
  return cudaGetLastError();
}

cudaError_t find_kernels() {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, choose_token_kernel);  // one stands for all
}

}  // namespace lococo::trt
