// op.h - in liblococo_trt: the ops behind one shape, as TensorRT's plugins want them: numbers that describe an op, and
// inputs and outputs by position. engines/lococo_engines/kernels.py writes the numbers and the order of the inputs.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "trt/ops/ops.h"

namespace lococo::trt {

enum class OpKind : int32_t { kEmbed = 0, kLayer = 1, kHead = 2, kLmHead = 3, kFusion = 4 };

// Positions in OpParameters::numbers.
enum OpNumber : int32_t {
  kOpKind,
  kOpDtype,
  kOpWidth,
  kOpHidden,
  kOpIntermediate,
  kOpNumHeads,
  kOpNumKvHeads,
  kOpHeadDim,
  kOpCapacity,
  kOpVocabSize,
  kOpRopeDigits,
  kOpBiases,  // bit i: the i-th of q, k, v, o, gate, up, down has one
  kOpQkNorm,
  kOpScores,  // scores accumulate
  kOpDecayPerToken,
  kOpNumLayers,
  kOpKeep,
  kOpMixed,
  kOpLocal,
  kOpKernelSize,
  kOpActivation,
  kOpNumConv,
  kOpConvOut,  // kMaxConvLayers numbers
  kOpNumbers = kOpConvOut + kMaxConvLayers,
};

struct OpParameters {
  std::array<int32_t, kOpNumbers> numbers;
  float eps;
  float score_decay;
};

// Why the kernels cannot run an op; "" if they can.
std::string unsupported(const OpParameters& op);
// What is slower on the current device than it could be, and why; "" if nothing.
std::string slow(const OpParameters& op);
int32_t num_inputs(const OpParameters& op);
int32_t num_outputs(const OpParameters& op);
size_t workspace_bytes(const OpParameters& op);
cudaError_t run(const OpParameters& op, const void* const* inputs, void* const* outputs, void* workspace,
                cudaStream_t stream);

}  // namespace lococo::trt
