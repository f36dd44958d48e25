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

// exp(x), as exact as T needs it.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// x * sigmoid(x), the sigmoid and the product rounded (arXiv 1702.03118).
template <typename T>
__device__ __forceinline__ float silu(float x) {
  const float base = 1.0f + exponential<T>(-x);
  return rounded<T>(x * rounded<T>(sizeof(T) == 4 ? 1.0f / base : __fdividef(1.0f, base)));
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

// A kernel may be launched before the one in front of it has ended (programmatic dependent launch, compute capability
// 9.0 and later): until this returns, only weights may be read, and nothing written.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// y = x / sqrt(mean(x^2) + eps) * weight, rounded after the division and after the product (arXiv 1910.07467).
// A block works on one row; y may be shared memory.
template <typename T>
__device__ void rms_norm_row(const T* x, const T* weight, int n, float eps, T* y, float* scratch) {
  constexpr int kSize = Pack<T>::kSize;
  const int packs = n / kSize;
  const int first = min(static_cast<int>(threadIdx.x), packs - 1);  // stays in registers
  const Pack<T> head = Pack<T>::load(x + first * kSize);
  const Pack<T> head_gain = Pack<T>::load(weight + first * kSize);
  float sum = threadIdx.x < packs ? dot(head, head, 0.0f) : 0.0f;
  for (int i = threadIdx.x + blockDim.x; i < packs; i += blockDim.x) {
    const Pack<T> p = Pack<T>::load(x + i * kSize);
    sum = dot(p, p, sum);
  }
  const float root = sqrtf(block_sum(sum, scratch) / static_cast<float>(n) + eps);
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    const Pack<T> p = i == first ? head : Pack<T>::load(x + i * kSize);
    const Pack<T> g = i == first ? head_gain : Pack<T>::load(weight + i * kSize);
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

// A warp makes a head of q or k of its row of channels [d]: norm if there is one, rotation, for q the scale. In place
// or not.
template <typename T>
__device__ __forceinline__ void finish_head(const T* from, T* to, const T* norm, float eps, const Rope& rope,
                                            const int32_t* position, int token, bool is_query, int d, float scale) {
  const int lane = threadIdx.x % 32;
  const int half = d / 2;
  float root = 1.0f;
  if (norm != nullptr) {
    float sum = 0.0f;
    for (int i = lane; i < d; i += 32) sum += to_float(from[i]) * to_float(from[i]);
    root = sqrtf(warp_sum(sum) / static_cast<float>(d) + eps);
  }
  const auto channel = [&](int i) {
    const float x = to_float(from[i]);
    return norm == nullptr ? x : rounded<T>(rounded<T>(x / root) * to_float(norm[i]));
  };
  for (int i = lane; i < half; i += 32) {
    float2 pair = rotate<T>(channel(i), channel(i + half), rope_angle(rope, *position + token, i));
    if (is_query) pair = {pair.x * scale, pair.y * scale};
    to[i] = from_float<T>(pair.x);
    to[i + half] = from_float<T>(pair.y);
  }
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

// Launches kernels one after another; after a failure it does nothing more. If they overlap, each is launched while the
// one before still runs, where the device can, and calls wait_for_previous: that hides what small kernels take to
// start, and costs large ones, whose blocks wait in each other's way.
class Launcher {
 public:
  explicit Launcher(cudaStream_t stream, bool overlaps = false) : stream_(stream) {
    int device = 0;
    int major = 0;
    code_ = cudaGetDevice(&device);
    if (code_ == cudaSuccess) code_ = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (code_ == cudaSuccess) {
      code_ = cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device);
    }
    if (code_ == cudaSuccess) {
      code_ = cudaDeviceGetAttribute(&most_shared_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    overlaps_ = overlaps && major >= 9;
  }

  template <typename... P, typename... A>
  void operator()(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, const A&... arguments) {
    if (code_ == cudaSuccess && shared > 48 * 1024) {  // more has to be asked for
      code_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    }
    if (code_ != cudaSuccess) return;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    config.attrs = &overlap;
    config.numAttrs = overlaps_ ? 1 : 0;
    code_ = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  }

  [[nodiscard]] cudaError_t code() const { return code_; }
  [[nodiscard]] int multiprocessors() const { return multiprocessors_; }
  // Bytes that a block can have.
  [[nodiscard]] size_t most_shared() const { return static_cast<size_t>(most_shared_); }

 private:
  cudaStream_t stream_;
  cudaError_t code_;
  bool overlaps_;
  int multiprocessors_ = 0;
  int most_shared_ = 0;
};

// Layer implementations by width.
size_t decode_workspace(const LayerShape& shape);
cudaError_t run_decode_layer(const LayerShape& shape, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                             cudaStream_t stream);
size_t block_workspace(const LayerShape& shape);
cudaError_t run_block_layer(const LayerShape& shape, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                            cudaStream_t stream);

}  // namespace lococo::trt
