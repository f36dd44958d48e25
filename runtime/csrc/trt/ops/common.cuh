// common.cuh - what the ops' kernels share. T is float, __half or __nv_bfloat16; arithmetic is in float, and a value is
// rounded to T wherever the model's own graph would hold a T.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "trt/ops/ops.h"

namespace lococo::trt {

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}
template <>
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// x as T would hold it.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// 16 bytes of T.
template <typename T>
struct Pack {
  static constexpr int kSize = 16 / sizeof(T);
  uint4 bits;

  __device__ __forceinline__ static Pack load(const T* p) { return {*reinterpret_cast<const uint4*>(p)}; }
  // Read once: leaves the caches to what is read again.
  __device__ __forceinline__ static Pack stream(const T* p) { return {__ldcs(reinterpret_cast<const uint4*>(p))}; }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = bits; }
  __device__ __forceinline__ float get(int i) const { return to_float(reinterpret_cast<const T*>(&bits)[i]); }
  __device__ __forceinline__ void set(int i, float x) { reinterpret_cast<T*>(&bits)[i] = from_float<T>(x); }
};

template <typename T>
__device__ __forceinline__ float dot(const Pack<T>& a, const Pack<T>& b, float sum) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) sum = fmaf(a.get(i), b.get(i), sum);
  return sum;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Of a whole block, in every thread. scratch: 32 floats of shared memory, free again after the next barrier.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0.0f;
  return warp_sum(x);
}

// y = x / sqrt(mean(x^2) + eps) * weight, rounded after the division and after the product (arXiv 1910.07467).
// A block works on one row; y may be shared memory.
template <typename T>
__device__ void rms_norm_row(const T* x, const T* weight, int n, float eps, T* y, float* scratch) {
  constexpr int kSize = Pack<T>::kSize;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n / kSize; i += blockDim.x) {
    const Pack<T> p = Pack<T>::load(x + i * kSize);
    sum = dot(p, p, sum);
  }
  const float root = sqrtf(block_sum(sum, scratch) / static_cast<float>(n) + eps);
  for (int i = threadIdx.x; i < n / kSize; i += blockDim.x) {
    const Pack<T> p = Pack<T>::load(x + i * kSize);
    const Pack<T> g = Pack<T>::load(weight + i * kSize);
    Pack<T> out;
#pragma unroll
    for (int j = 0; j < kSize; ++j) out.set(j, rounded<T>(p.get(j) / root) * g.get(j));
    out.store(y + i * kSize);
  }
  __syncthreads();
}

// A block a row.
template <typename T>
__global__ void rms_norm_kernel(const T* x, const T* weight, T* out, int hidden, float eps) {
  __shared__ float scratch[32];
  const int64_t start = static_cast<int64_t>(blockIdx.x) * hidden;
  rms_norm_row(x + start, weight, hidden, eps, out + start, scratch);
}

struct Rope {
  const float* cos[kMaxRopeDigits];
  const float* sin[kMaxRopeDigits];
  int digits;
  int half;  // d / 2
};

// cos and sin of position * frequency[i], by the position's digits: exp(i(x + y)) = exp(ix) exp(iy).
__device__ __forceinline__ float2 rope_angle(const Rope& r, int position, int i) {
  float2 angle = {1.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < kMaxRopeDigits; ++k) {
    if (k >= r.digits) break;
    const bool last = k + 1 == r.digits;
    const int digit = last ? position : position & ((1 << kRopeDigitBits) - 1);
    position >>= kRopeDigitBits;
    const float c = r.cos[k][static_cast<int64_t>(digit) * r.half + i];
    const float s = r.sin[k][static_cast<int64_t>(digit) * r.half + i];
    angle = k == 0 ? float2{c, s} : float2{angle.x * c - angle.y * s, angle.y * c + angle.x * s};
  }
  return angle;
}

// The half-split rotation of one pair (arXiv 2104.09864), every product and sum rounded.
template <typename T>
__device__ __forceinline__ float2 rotate(float low, float high, float2 angle) {
  const float c = rounded<T>(angle.x);
  const float s = rounded<T>(angle.y);
  return {rounded<T>(rounded<T>(low * c) - rounded<T>(high * s)),
          rounded<T>(rounded<T>(high * c) + rounded<T>(low * s))};
}

inline Rope make_rope(const LayerShape& shape, const LayerInputs& in) {
  Rope r{};
  for (int k = 0; k < shape.rope_digits; ++k) {
    r.cos[k] = in.rope_cos[k];
    r.sin[k] = in.rope_sin[k];
  }
  r.digits = shape.rope_digits;
  r.half = shape.head_dim / 2;
  return r;
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr size_t aligned(size_t n) { return (n + 255) / 256 * 256; }

// Hands out parts of a workspace, each at a multiple of 256 bytes; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <typename T>
  T* take(size_t count) {
    auto* p = reinterpret_cast<T*>(base_ + used_);
    used_ += aligned(count * sizeof(T));
    return p;
  }
  [[nodiscard]] size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

// 1 / sqrt(d) as the model's dtype holds it.
inline float rounded_scale(OpDtype dtype, int head_dim) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  if (dtype == OpDtype::kFloat16) return __half2float(__float2half_rn(scale));
  if (dtype == OpDtype::kBfloat16) return __bfloat162float(__float2bfloat16_rn(scale));
  return scale;
}

// Calls body(T()) with the C++ type of dtype.
template <typename F>
auto with_dtype(OpDtype dtype, F&& body) {
  switch (dtype) {
    case OpDtype::kFloat16:
      return body(__half());
    case OpDtype::kBfloat16:
      return body(__nv_bfloat16());
    default:
      return body(0.0f);
  }
}

// More dynamic shared memory than 48 KB has to be asked for, once a kernel.
template <typename K>
cudaError_t allow_shared(K kernel, size_t nbytes) {
  if (nbytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(nbytes));
}

// Layer implementations by width.
size_t decode_workspace(const LayerShape& shape);
cudaError_t run_decode_layer(const LayerShape& shape, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                             cudaStream_t stream);
size_t block_workspace(const LayerShape& shape);
cudaError_t run_block_layer(const LayerShape& shape, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                            cudaStream_t stream);

}  // namespace lococo::trt
