#include "trt/ops/op.h"

#include "error.h"

namespace lococo::trt {
namespace {

constexpr int32_t kNumLinears = 7;

OpKind kind_of(const OpParameters& op) { return static_cast<OpKind>(op.numbers[kOpKind]); }
OpDtype dtype_of(const OpParameters& op) { return static_cast<OpDtype>(op.numbers[kOpDtype]); }
int32_t count_bits(int32_t bits) { return bits == 0 ? 0 : (bits & 1) + count_bits(bits >> 1); }

LayerShape layer_shape(const OpParameters& op) {
  const auto& n = op.numbers;
  return {dtype_of(op),     n[kOpWidth],      n[kOpHidden],   n[kOpIntermediate],
          n[kOpNumHeads],   n[kOpNumKvHeads], n[kOpHeadDim],  n[kOpCapacity],
          n[kOpRopeDigits], op.eps,           op.score_decay, n[kOpDecayPerToken] != 0};
}

FusionShape fusion_shape(const OpParameters& op) {
  const auto& n = op.numbers;
  FusionShape s = {dtype_of(op),
                   n[kOpNumLayers],
                   n[kOpWidth],
                   n[kOpNumKvHeads],
                   n[kOpHeadDim],
                   n[kOpCapacity],
                   n[kOpKeep],
                   n[kOpMixed],
                   n[kOpLocal],
                   n[kOpNumConv],
                   n[kOpKernelSize],
                   {},
                   static_cast<Activation>(n[kOpActivation]),
                   n[kOpScores] != 0};
  for (int i = 0; i < kMaxConvLayers; ++i) s.conv_out[i] = n[kOpConvOut + i];
  return s;
}

// Takes inputs one after another.
class Reader {
 public:
  explicit Reader(const void* const* next) : next_(next) {}
  template <typename T = void>
  const T* take(bool present = true) {
    return present ? static_cast<const T*>(*next_++) : nullptr;
  }

 private:
  const void* const* next_;
};

cudaError_t run_layer_op(const OpParameters& op, const void* const* inputs, void* const* outputs, void* workspace,
                         cudaStream_t stream) {
  const auto& n = op.numbers;
  Reader r(inputs);
  LayerInputs in{};
  in.x = r.take();
  in.position = r.take<int32_t>();
  in.past_length = r.take<int32_t>();
  in.num_tokens = r.take<int32_t>(n[kOpWidth] > 1);
  in.past_key = r.take();
  in.past_value = r.take();
  in.past_scores = r.take<float>(n[kOpScores] != 0);
  in.input_norm = r.take();
  in.post_norm = r.take();
  Linear* const linears[kNumLinears] = {&in.q, &in.k, &in.v, &in.o, &in.gate, &in.up, &in.down};
  for (Linear* linear : linears) linear->weight = r.take();
  for (int i = 0; i < kNumLinears; ++i) linears[i]->bias = r.take((n[kOpBiases] >> i & 1) != 0);
  in.q_norm = r.take(n[kOpQkNorm] != 0);
  in.k_norm = r.take(n[kOpQkNorm] != 0);
  for (int i = 0; i < n[kOpRopeDigits]; ++i) {
    in.rope_cos[i] = r.take<float>();
    in.rope_sin[i] = r.take<float>();
  }
  const LayerOutputs out = {outputs[0], outputs[1], outputs[2], static_cast<float*>(outputs[3])};
  return run_layer(layer_shape(op), in, out, workspace, stream);
}

cudaError_t run_fusion_op(const OpParameters& op, const void* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) {
  const auto& n = op.numbers;
  Reader r(inputs);
  const bool padded = n[kOpWidth] > 1;
  const auto* past_length = r.take<int32_t>(padded);
  const auto* num_tokens = r.take<int32_t>(padded);
  FusionLayer layers[kMaxFusionLayers] = {};
  for (int i = 0; i < n[kOpNumLayers]; ++i) {
    FusionLayer& layer = layers[i];
    layer.past_key = r.take();
    layer.past_value = r.take();
    layer.new_key = r.take();
    layer.new_value = r.take();
    layer.scores = r.take<float>();
    if (n[kOpMixed] > 0) {
      layer.normalizer = r.take();
      for (int j = 0; j < n[kOpNumConv]; ++j) {
        layer.weight[j] = r.take();
        layer.bias[j] = r.take();
      }
    }
    layer.key = *outputs++;
    layer.value = *outputs++;
    if (n[kOpScores] != 0) layer.out_scores = static_cast<float*>(*outputs++);
  }
  return run_fusion(fusion_shape(op), layers, past_length, num_tokens, workspace, stream);
}

}  // namespace

std::string unsupported(const OpParameters& op) {
  const auto& n = op.numbers;
  const int32_t pack = dtype_of(op) == OpDtype::kFloat32 ? 4 : 8;  // values of 16 bytes
  const auto require_pack = [&](OpNumber which, const char* name) {
    return n[which] % pack == 0 ? std::string() : format("%s: expected a multiple of %d, got %d", name, pack, n[which]);
  };
  std::string reason;
  switch (kind_of(op)) {
    case OpKind::kEmbed:
    case OpKind::kHead:
    case OpKind::kLmHead:
      return require_pack(kOpHidden, "hidden_size");
    case OpKind::kLayer:
      reason = require_pack(kOpHidden, "hidden_size");
      if (reason.empty()) reason = require_pack(kOpIntermediate, "intermediate_size");
      [[fallthrough]];
    case OpKind::kFusion: {
      const int32_t lanes = n[kOpHeadDim] / pack;
      const bool is_even = n[kOpHeadDim] % pack == 0 && lanes > 0;
      if (reason.empty() && (!is_even || (lanes & (lanes - 1)) != 0 || lanes > 32)) {
        reason =
            format("head_dim: expected %d times a power of two, at most %d, got %d", pack, 32 * pack, n[kOpHeadDim]);
      }
      if (reason.empty() && n[kOpNumConv] > kMaxConvLayers) {
        reason = format("num_conv_layers: expected at most %d, got %d", kMaxConvLayers, n[kOpNumConv]);
      }
      return reason;
    }
  }
  return format("op %d is not known", n[kOpKind]);
}

std::string slow(const OpParameters& op) {
  return kind_of(op) == OpKind::kFusion ? slow_convolution(fusion_shape(op)) : "";
}

int32_t num_inputs(const OpParameters& op) {
  const auto& n = op.numbers;
  const int32_t padded = n[kOpWidth] > 1 ? 1 : 0;
  switch (kind_of(op)) {
    case OpKind::kEmbed:
    case OpKind::kLmHead:
      return 2;
    case OpKind::kHead:
      return 3 + padded;
    case OpKind::kLayer:
      return 7 + padded + n[kOpScores] + kNumLinears + count_bits(n[kOpBiases]) + 2 * n[kOpQkNorm] +
             2 * n[kOpRopeDigits];
    case OpKind::kFusion:
      return 2 * padded + n[kOpNumLayers] * (5 + (n[kOpMixed] > 0 ? 1 + 2 * n[kOpNumConv] : 0));
  }
  return 0;
}

int32_t num_outputs(const OpParameters& op) {
  const auto& n = op.numbers;
  switch (kind_of(op)) {
    case OpKind::kEmbed:
    case OpKind::kLmHead:
      return 1;
    case OpKind::kHead:
      return n[kOpWidth] > 1 ? 2 : 1;
    case OpKind::kLayer:
      return 4;
    case OpKind::kFusion:
      return n[kOpNumLayers] * (n[kOpScores] != 0 ? 3 : 2);
  }
  return 0;
}

size_t workspace_bytes(const OpParameters& op) {
  switch (kind_of(op)) {
    case OpKind::kLayer:
      return layer_workspace(layer_shape(op));
    case OpKind::kFusion:
      return fusion_workspace(fusion_shape(op));
    default:
      return 0;
  }
}

cudaError_t run(const OpParameters& op, const void* const* inputs, void* const* outputs, void* workspace,
                cudaStream_t stream) {
  const auto& n = op.numbers;
  switch (kind_of(op)) {
    case OpKind::kEmbed:
      return run_embed(dtype_of(op), n[kOpWidth], n[kOpHidden], static_cast<const int32_t*>(inputs[0]), inputs[1],
                       outputs[0], stream);
    case OpKind::kHead: {
      const bool padded = n[kOpWidth] > 1;
      const auto* num_tokens = padded ? static_cast<const int32_t*>(inputs[1]) : nullptr;
      const void* const* weights = inputs + (padded ? 2 : 1);
      return run_head(dtype_of(op), n[kOpWidth], n[kOpHidden], n[kOpVocabSize], op.eps, inputs[0], num_tokens,
                      weights[0], weights[1], static_cast<float*>(outputs[0]), padded ? outputs[1] : nullptr, stream);
    }
    case OpKind::kLmHead:
      return run_lm_head(dtype_of(op), n[kOpWidth], n[kOpHidden], n[kOpVocabSize], inputs[0], inputs[1],
                         static_cast<float*>(outputs[0]), stream);
    case OpKind::kLayer:
      return run_layer_op(op, inputs, outputs, workspace, stream);
    case OpKind::kFusion:
      return run_fusion_op(op, inputs, outputs, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lococo::trt
