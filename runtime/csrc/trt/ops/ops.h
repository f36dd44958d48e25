// ops.h - in liblococo_trt: the parts of a model as CUDA kernels, one function each: embedding, decoder layer, final
// norm with logits, fusion. Every shape is fixed; live lengths are read on the device, so that launches can be
// captured.
//
// Letters: w tokens of a forward, c capacity, s = c + w, h KV heads, g query heads for each, d head_dim.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace lococo::trt {

enum class OpDtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

constexpr int kMaxRopeDigits = 4;
constexpr int kRopeDigitBits = 11;  // digits of base 2048, as in the bundle's tables
constexpr int kMaxConvLayers = 4;
constexpr int kMaxFusionLayers = 16;  // of one launch: its pointers are kernel arguments

// Shapes of one decoder layer.
struct LayerShape {
  OpDtype dtype;
  int32_t width;   // w
  int32_t hidden;  // a multiple of 16 bytes, as are all rows
  int32_t intermediate;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;  // rows of a power of two times 16 bytes, at most 512
  int32_t capacity;
  int32_t rope_digits;
  float eps;
  float score_decay;     // 0: no past scores
  bool decay_per_token;  // a query of age a counts score_decay^a; else the past counts score_decay in every forward
};

struct Linear {
  const void* weight;  // [out, in]
  const void* bias;    // [out], or NULL
};

struct LayerInputs {
  const void* x;  // [w, hidden]
  const int32_t* position;
  const int32_t* past_length;
  const int32_t* num_tokens;  // NULL if w is 1
  const void* past_key;       // [h, c, d]
  const void* past_value;
  const float* past_scores;  // [h, c], or NULL
  const void* input_norm;    // [hidden]
  const void* post_norm;
  const void* q_norm;  // [d], or NULL
  const void* k_norm;
  Linear q, k, v, o, gate, up, down;
  const float* rope_cos[kMaxRopeDigits];  // [2048, d/2]; the last one may be shorter
  const float* rope_sin[kMaxRopeDigits];
};

struct LayerOutputs {
  void* x;    // [w, hidden]
  void* key;  // [h, w, d]
  void* value;
  float* scores;  // [h, s]
};

size_t layer_workspace(const LayerShape& shape);
cudaError_t run_layer(const LayerShape& shape, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                      cudaStream_t stream);

// out[i] = table[ids[i]]: ids (w), table [*, hidden], out [w, hidden].
cudaError_t run_embed(OpDtype dtype, int32_t width, int32_t hidden, const int32_t* ids, const void* table, void* out,
                      cudaStream_t stream);

// Final norm of x [w, hidden] and the logits [vocab] of token num_tokens - 1; hidden_states [w, hidden] if w > 1.
cudaError_t run_head(OpDtype dtype, int32_t width, int32_t hidden, int32_t vocab_size, float eps, const void* x,
                     const int32_t* num_tokens, const void* norm, const void* weight, float* logits,
                     void* hidden_states, cudaStream_t stream);

// logits [w, vocab] of hidden_states [w, hidden].
cudaError_t run_lm_head(OpDtype dtype, int32_t width, int32_t hidden, int32_t vocab_size, const void* hidden_states,
                        const void* weight, float* logits, cudaStream_t stream);

enum class Activation : int32_t { kNone = 0, kRelu = 1, kSilu = 2, kTanh = 3, kGelu = 4 };

// Shapes of a fusion (arXiv 2406.05317, section 3): of L + n live columns, `keep` stay and `mixed` are made of the
// rest.
struct FusionShape {
  OpDtype dtype;
  int32_t num_layers;  // at most kMaxFusionLayers
  int32_t width;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t capacity;
  int32_t keep;   // local_len included
  int32_t mixed;  // 0: pure eviction
  int32_t local_len;
  int32_t num_conv;
  int32_t kernel_size;  // odd
  int32_t conv_out[kMaxConvLayers];
  Activation activation;
  bool scores;  // fuses accumulated scores too
};

struct FusionLayer {
  const void* past_key;  // [h, c, d]
  const void* past_value;
  const void* new_key;  // [h, w, d]
  const void* new_value;
  const float* scores;                 // [h, s]
  const void* normalizer;              // [1], NULL if mixed is 0
  const void* weight[kMaxConvLayers];  // [out, in, kernel]
  const void* bias[kMaxConvLayers];
  void* key;  // [h, c, d]
  void* value;
  float* out_scores;  // [h, c], or NULL
};

size_t fusion_workspace(const FusionShape& shape);
// Which convolution of a 16-bit fusion takes the slow way on the current device, and why; "" if none.
std::string slow_convolution(const FusionShape& shape);
// past_length and num_tokens: NULL for c and 1, as after a single token.
cudaError_t run_fusion(const FusionShape& shape, const FusionLayer* layers, const int32_t* past_length,
                       const int32_t* num_tokens, void* workspace, cudaStream_t stream);

}  // namespace lococo::trt
