// kernels.h - in liblococo_trt: what happens on the device between two graphs of TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lococo::trt {

// Where a session stands: what the host wrote, or the device itself inside a window.
struct Cursor {
  int32_t* position;     // of the next token
  int32_t* past_length;  // L
  int32_t* num_tokens;   // n
  int32_t* input_ids;
};

// K and V of every layer: columns 0..n-1 of [H, w, d] become columns L..L+n-1 of [H, C, d].
struct Columns {
  uint8_t* state;         // K0, V0, K1, ...
  const uint8_t* fresh;   // the same order
  uint64_t state_stride;  // bytes between two of state
  uint64_t fresh_stride;  // bytes between two of fresh
  int32_t num_tensors;    // 2 * layers
  int32_t num_heads;      // H
  int32_t capacity;       // C
  int32_t width;          // w
  int32_t column_bytes;   // of one head's column, d * element: a multiple of 4
};
cudaError_t append_columns(const Columns& columns, const Cursor& cursor, cudaStream_t stream);

// Accumulated scores of every layer: [H, C + w] to [H, C], columns 0..L-1 from the first ones, L..L+n-1 from C on.
struct Scores {
  float* state;
  const float* fresh;
  uint64_t state_stride;  // floats
  uint64_t fresh_stride;  // floats
  int32_t num_layers;
  int32_t num_heads;
  int32_t capacity;
  int32_t width;
};
cudaError_t append_scores(const Scores& scores, const Cursor& cursor, cudaStream_t stream);

// Memory of choose_token, zero at the start of a window.
struct Chooser {
  unsigned long long best;  // the highest logit so far and its token, as one number
  uint32_t blocks_done;
  uint32_t index;  // of the token in the window
  uint64_t unused[2];
};

// Greedy sampling: the highest of logits (vocab_size), the lowest id on a tie, becomes input_ids[0] and ring[index]; -1
// in ring if a logit is NaN or +inf or all are -inf. From the second token of a window on, the cursor moves by one.
cudaError_t choose_token(const float* logits, int32_t vocab_size, Chooser* chooser, int32_t* ring, const Cursor& cursor,
                         cudaStream_t stream);

// Whether this library was compiled for the current device.
cudaError_t find_kernels();

}  // namespace lococo::trt
