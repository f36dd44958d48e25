// One token: matrix-vector products that read every weight once, at the speed of memory. Five kernels a layer: norm
// with q, k, v and rotation; attention; o_proj with the residual; norm with gate and up; down_proj with the residual.
#include <cfloat>

#include "trt/ops/common.cuh"

namespace lococo::trt {
namespace {

constexpr int kWarps = 4;  // of a matrix-vector block

// Dot products of `kRows` rows of a weight with x (n), by one warp; the sums are in every lane.
template <typename T, int kRows>
__device__ __forceinline__ void dot_rows(const T* const (&rows)[kRows], const T* x, int n, float (&sums)[kRows]) {
  constexpr int kSize = Pack<T>::kSize;
  const int packs = n / kSize;
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = 0.0f;
  int i = threadIdx.x % 32;
  constexpr int kUnroll = 4;
  for (; i + 32 * (kUnroll - 1) < packs; i += 32 * kUnroll) {  // loads first: they are what takes time
    Pack<T> w[kUnroll][kRows];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) w[u][r] = Pack<T>::stream(rows[r] + (i + 32 * u) * kSize);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Pack<T> v = Pack<T>::load(x + (i + 32 * u) * kSize);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] = dot(w[u][r], v, sums[r]);
    }
  }
  for (; i < packs; i += 32) {
    const Pack<T> v = Pack<T>::load(x + i * kSize);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = dot(Pack<T>::stream(rows[r] + i * kSize), v, sums[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = warp_sum(sums[r]);
}

template <typename T>
__device__ __forceinline__ float with_bias(float sum, const void* bias, int row) {
  return rounded<T>(bias == nullptr ? sum : sum + to_float(static_cast<const T*>(bias)[row]));
}

// A block's part of a norm: y (n) in shared memory.
template <typename T>
__device__ __forceinline__ T* normed(const T* x, const T* weight, int n, float eps) {
  extern __shared__ __align__(16) unsigned char shared_row[];
  __shared__ float scratch[32];
  T* y = reinterpret_cast<T*>(shared_row);
  rms_norm_row(x, weight, n, eps, y, scratch);
  return y;
}

struct QkvArguments {
  const void* x;
  const void* norm;
  Linear q, k, v;
  void* query;  // [heads, d], scaled if `finish`
  void* key;    // [h, d]
  void* value;
  const int32_t* position;
  Rope rope;
  int hidden, num_heads, num_kv_heads, head_dim;
  float eps, scale;
  bool finish;  // rotate here; else norms of q and k come first
};

// A warp makes the pair of channels i and i + d/2 of a head, which the rotation mixes.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) qkv_kernel(QkvArguments a) {
  const T* y = normed(static_cast<const T*>(a.x), static_cast<const T*>(a.norm), a.hidden, a.eps);
  const int half = a.head_dim / 2;
  const int pair = blockIdx.x * kWarps + threadIdx.x / 32;
  int head = pair / half;
  const int i = pair % half;
  if (head >= a.num_heads + 2 * a.num_kv_heads) return;
  Linear linear = a.q;
  T* to = static_cast<T*>(a.query);
  bool is_query = true;
  bool is_value = false;
  if (head >= a.num_heads) {
    head -= a.num_heads;
    is_query = false;
    is_value = head >= a.num_kv_heads;
    if (is_value) head -= a.num_kv_heads;
    linear = is_value ? a.v : a.k;
    to = static_cast<T*>(is_value ? a.value : a.key);
  }
  const int row = head * a.head_dim + i;
  const T* weight = static_cast<const T*>(linear.weight);
  const T* const rows[2] = {weight + static_cast<int64_t>(row) * a.hidden,
                            weight + static_cast<int64_t>(row + half) * a.hidden};
  float sums[2];
  dot_rows<T, 2>(rows, y, a.hidden, sums);
  if (threadIdx.x % 32 != 0) return;
  float2 pairs = {with_bias<T>(sums[0], linear.bias, row), with_bias<T>(sums[1], linear.bias, row + half)};
  if (!is_value && a.finish) {
    pairs = rotate<T>(pairs.x, pairs.y, rope_angle(a.rope, *a.position, i));
    if (is_query) pairs = {pairs.x * a.scale, pairs.y * a.scale};
  }
  to[row] = from_float<T>(pairs.x);
  to[row + half] = from_float<T>(pairs.y);
}

// In place: norm of each head of q and k, then the rotation. One warp a head.
template <typename T>
__global__ void norm_heads_kernel(QkvArguments a, const T* q_norm, const T* k_norm) {
  const int head = blockIdx.x;
  const bool is_query = head < a.num_heads;
  T* row = is_query ? static_cast<T*>(a.query) + head * a.head_dim
                    : static_cast<T*>(a.key) + (head - a.num_heads) * a.head_dim;
  const T* weight = is_query ? q_norm : k_norm;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < a.head_dim; i += 32) sum += to_float(row[i]) * to_float(row[i]);
  const float root = sqrtf(warp_sum(sum) / static_cast<float>(a.head_dim) + a.eps);
  const int half = a.head_dim / 2;
  for (int i = threadIdx.x; i < half; i += 32) {
    const float low = rounded<T>(rounded<T>(to_float(row[i]) / root) * to_float(weight[i]));
    const float high = rounded<T>(rounded<T>(to_float(row[i + half]) / root) * to_float(weight[i + half]));
    float2 pair = rotate<T>(low, high, rope_angle(a.rope, *a.position, i));
    if (is_query) pair = {pair.x * a.scale, pair.y * a.scale};
    row[i] = from_float<T>(pair.x);
    row[i + half] = from_float<T>(pair.y);
  }
}

struct AttentionArguments {
  const void* query;  // [h * g, d], scaled
  const void* past_key;
  const void* past_value;
  const void* new_key;  // [h, 1, d]
  const void* new_value;
  const float* past_scores;
  void* out;      // [h * g, d]
  float* scores;  // [h, c + 1]
  const int32_t* past_length;
  int group, head_dim, capacity;
  float score_decay;
};

// One block a KV head and its g query heads, kGroup at a time. Columns 0..L-1 of the cache and the new one are seen.
// Shared memory: the logits, then the probabilities, [kGroup][c + 1]; a partial output for each warp,
// [warps][kGroup][d].
template <typename T, int kGroup, int kThreads>
__global__ void __launch_bounds__(kThreads) attention_kernel(AttentionArguments a) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kAhead = 4;  // rows that a thread asks for before it needs the first
  constexpr int kWarpCount = kThreads / 32;
  constexpr int kWarpsPerHead = kWarpCount / kGroup;
  extern __shared__ float shared[];
  __shared__ float highest_of[kWarpCount];
  __shared__ float sum_of[kWarpCount];
  const int kv_head = blockIdx.x;
  const int d = a.head_dim;
  const int lanes = d / kSize;  // that share a row, a power of two
  const int lane = threadIdx.x % lanes;
  const int first = threadIdx.x / lanes;
  const int step = kThreads / lanes;  // columns at a time
  const int warp = threadIdx.x / 32;
  const int length = *a.past_length;
  const int columns = length + 1;
  const int stride = a.capacity + 1;
  float* logits = shared;
  float* partial = shared + kGroup * stride;

  // Beyond the last column: the last one again, to be ignored.
  const auto load = [&](const void* past, const void* fresh, int column) {
    const T* row = column < length
                       ? static_cast<const T*>(past) + (static_cast<int64_t>(kv_head) * a.capacity + column) * d
                       : static_cast<const T*>(fresh) + static_cast<int64_t>(kv_head) * d;
    return Pack<T>::load(row + lane * kSize);
  };

  float* scores = a.scores + static_cast<int64_t>(kv_head) * stride;
  for (int first_head = 0; first_head < a.group; first_head += kGroup) {
    const int head = kv_head * a.group + first_head;
    Pack<T> query[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      query[g] = Pack<T>::load(static_cast<const T*>(a.query) + static_cast<int64_t>(head + g) * d + lane * kSize);
    }
    // All threads take every turn: the shuffles are of whole warps.
    for (int base = 0; base < columns; base += kAhead * step) {
      Pack<T> keys[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) keys[u] = load(a.past_key, a.new_key, base + u * step + first);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int column = base + u * step + first;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          float sum = dot(query[g], keys[u], 0.0f);
          for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
          if (column < columns && lane == 0) logits[g * stride + column] = rounded<T>(sum);
        }
      }
    }
    Pack<T> values[kAhead];  // on their way during the softmax
#pragma unroll
    for (int u = 0; u < kAhead; ++u) values[u] = load(a.past_value, a.new_value, u * step + first);
    __syncthreads();

    // Softmax: a few warps for each query head.
    const int mine = warp / kWarpsPerHead;
    const int thread = threadIdx.x - mine * kWarpsPerHead * 32;
    float* row = logits + mine * stride;
    float highest = -FLT_MAX;
    if (mine < kGroup) {
      for (int i = thread; i < columns; i += kWarpsPerHead * 32) highest = fmaxf(highest, row[i]);
    }
    highest = warp_max(highest);
    if (threadIdx.x % 32 == 0) highest_of[warp] = highest;
    __syncthreads();
    float sum = 0.0f;
    if (mine < kGroup) {
#pragma unroll
      for (int i = 0; i < kWarpsPerHead; ++i) highest = fmaxf(highest, highest_of[mine * kWarpsPerHead + i]);
      for (int i = thread; i < columns; i += kWarpsPerHead * 32) {
        row[i] = expf(row[i] - highest);
        sum += row[i];
      }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sum_of[warp] = sum;
    __syncthreads();
    if (mine < kGroup) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarpsPerHead; ++i) total += sum_of[mine * kWarpsPerHead + i];
      for (int i = thread; i < columns; i += kWarpsPerHead * 32) row[i] /= total;
    }
    __syncthreads();

    // What each column collects: float32 probabilities, summed over the group.
    for (int i = threadIdx.x; i < stride; i += kThreads) {
      const int column = i < length ? i : i == a.capacity ? length : -1;
      float collected = first_head > 0 ? scores[i] : 0.0f;
      if (column >= 0) {
#pragma unroll
        for (int g = 0; g < kGroup; ++g) collected += logits[g * stride + column];
      }
      if (first_head == 0 && a.past_scores != nullptr && i < a.capacity) {
        collected += a.score_decay * a.past_scores[static_cast<int64_t>(kv_head) * a.capacity + i];
      }
      scores[i] = collected;
    }

    float sums[kGroup][kSize] = {};
    for (int base = 0; base < columns; base += kAhead * step) {
      if (base > 0) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) values[u] = load(a.past_value, a.new_value, base + u * step + first);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int column = base + u * step + first;
        if (column >= columns) continue;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          const float p = rounded<T>(logits[g * stride + column]);
#pragma unroll
          for (int j = 0; j < kSize; ++j) sums[g][j] = fmaf(p, values[u].get(j), sums[g][j]);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        for (int offset = lanes; offset < 32; offset *= 2) {
          sums[g][j] += __shfl_xor_sync(0xffffffffu, sums[g][j], offset);
        }
        if (threadIdx.x % 32 < lanes) partial[(warp * kGroup + g) * d + lane * kSize + j] = sums[g][j];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kGroup * d; i += kThreads) {
      float out = 0.0f;
#pragma unroll 8
      for (int other = 0; other < kWarpCount; ++other) out += partial[other * kGroup * d + i];
      static_cast<T*>(a.out)[static_cast<int64_t>(head) * d + i] = from_float<T>(out);
    }
    __syncthreads();
  }
}

// out = residual + x W^T: one row a warp.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    project_kernel(const T* x, Linear linear, const T* residual, T* out, int in_size, int out_size) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= out_size) return;
  const T* const rows[1] = {static_cast<const T*>(linear.weight) + static_cast<int64_t>(row) * in_size};
  float sums[1];
  dot_rows<T, 1>(rows, x, in_size, sums);
  if (threadIdx.x % 32 == 0) {
    out[row] = from_float<T>(to_float(residual[row]) + with_bias<T>(sums[0], linear.bias, row));
  }
}

// silu(gate) * up of the norm of x.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    gate_up_kernel(const T* x, const T* norm, Linear gate, Linear up, T* out, int hidden, int intermediate, float eps) {
  const T* y = normed(x, norm, hidden, eps);
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= intermediate) return;
  const int64_t start = static_cast<int64_t>(row) * hidden;
  const T* const rows[2] = {static_cast<const T*>(gate.weight) + start, static_cast<const T*>(up.weight) + start};
  float sums[2];
  dot_rows<T, 2>(rows, y, hidden, sums);
  if (threadIdx.x % 32 != 0) return;
  const float g = with_bias<T>(sums[0], gate.bias, row);
  const float gated = rounded<T>(g * rounded<T>(1.0f / (1.0f + expf(-g))));
  out[row] = from_float<T>(gated * with_bias<T>(sums[1], up.bias, row));
}

// Logits of one row of x, two a warp; the row is token num_tokens - 1.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    head_kernel(const T* x, const int32_t* num_tokens, const T* norm, const T* weight, float* logits, int hidden,
                int vocab_size, float eps) {
  const int64_t token = num_tokens == nullptr ? 0 : *num_tokens - 1;
  const T* y = normed(x + token * hidden, norm, hidden, eps);
  const int row = 2 * (blockIdx.x * kWarps + threadIdx.x / 32);
  if (row >= vocab_size) return;
  const int other = min(row + 1, vocab_size - 1);
  const T* const rows[2] = {weight + static_cast<int64_t>(row) * hidden, weight + static_cast<int64_t>(other) * hidden};
  float sums[2];
  dot_rows<T, 2>(rows, y, hidden, sums);
  if (threadIdx.x % 32 == 0) {
    logits[row] = rounded<T>(sums[0]);
    logits[other] = rounded<T>(sums[1]);
  }
}

template <typename T>
__global__ void embed_kernel(const int32_t* ids, const T* table, T* out, int hidden) {
  constexpr int kSize = Pack<T>::kSize;
  const T* row = table + static_cast<int64_t>(ids[blockIdx.x]) * hidden;
  T* to = out + static_cast<int64_t>(blockIdx.x) * hidden;
  for (int i = threadIdx.x; i < hidden / kSize; i += blockDim.x) Pack<T>::load(row + i * kSize).store(to + i * kSize);
}

template <typename T, int kGroup>
cudaError_t launch_attention(const AttentionArguments& a, int num_kv_heads, cudaStream_t stream) {
  constexpr int kThreads = kGroup <= 3 ? 1024 : 512;  // as registers allow
  const size_t nbytes = sizeof(float) * kGroup * (static_cast<size_t>(a.capacity) + 1 + kThreads / 32 * a.head_dim);
  const cudaError_t code = allow_shared(attention_kernel<T, kGroup, kThreads>, nbytes);
  if (code != cudaSuccess) return code;
  attention_kernel<T, kGroup, kThreads><<<num_kv_heads, kThreads, nbytes, stream>>>(a);
  return cudaGetLastError();
}

// In slices of the largest group that divides the heads and that the registers hold.
template <typename T, int kGroup = 8>
cudaError_t attention(const AttentionArguments& a, int num_kv_heads, cudaStream_t stream) {
  if constexpr (kGroup > 1) {
    if (a.group % kGroup != 0) return attention<T, kGroup - 1>(a, num_kv_heads, stream);
  }
  return launch_attention<T, kGroup>(a, num_kv_heads, stream);
}

template <typename T>
struct Scratch {
  T* query;     // [heads, d]
  T* attended;  // [heads, d]
  T* middle;    // [hidden], after attention
  T* gated;     // [intermediate]
};

template <typename T>
Scratch<T> carve(const LayerShape& s, Carver& carver) {
  const size_t heads = static_cast<size_t>(s.num_heads) * s.head_dim;
  return {carver.take<T>(heads), carver.take<T>(heads), carver.take<T>(s.hidden), carver.take<T>(s.intermediate)};
}

template <typename T>
cudaError_t decode_layer(const LayerShape& s, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                         cudaStream_t stream) {
  Carver carver(workspace);
  const Scratch<T> scratch = carve<T>(s, carver);
  const auto* x = static_cast<const T*>(in.x);
  const size_t row_bytes = sizeof(T) * static_cast<size_t>(s.hidden);
  constexpr int kThreads = 32 * kWarps;
  cudaError_t code = allow_shared(qkv_kernel<T>, row_bytes);
  if (code == cudaSuccess) code = allow_shared(gate_up_kernel<T>, row_bytes);
  if (code != cudaSuccess) return code;

  const float scale = rounded_scale(s.dtype, s.head_dim);
  const QkvArguments qkv = {x,
                            in.input_norm,
                            in.q,
                            in.k,
                            in.v,
                            scratch.query,
                            out.key,
                            out.value,
                            in.position,
                            make_rope(s, in),
                            s.hidden,
                            s.num_heads,
                            s.num_kv_heads,
                            s.head_dim,
                            s.eps,
                            scale,
                            in.q_norm == nullptr};
  const int pairs = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim / 2;
  qkv_kernel<T><<<ceil_div(pairs, kWarps), kThreads, row_bytes, stream>>>(qkv);
  if (in.q_norm != nullptr) {
    norm_heads_kernel<T><<<s.num_heads + s.num_kv_heads, 32, 0, stream>>>(qkv, static_cast<const T*>(in.q_norm),
                                                                          static_cast<const T*>(in.k_norm));
  }
  const AttentionArguments a = {
      scratch.query,  in.past_key,      in.past_value, out.key,        out.value,
      in.past_scores, scratch.attended, out.scores,    in.past_length, s.num_heads / s.num_kv_heads,
      s.head_dim,     s.capacity,       s.score_decay};
  code = attention<T>(a, s.num_kv_heads, stream);
  if (code != cudaSuccess) return code;
  const int heads = s.num_heads * s.head_dim;
  project_kernel<T>
      <<<ceil_div(s.hidden, kWarps), kThreads, 0, stream>>>(scratch.attended, in.o, x, scratch.middle, heads, s.hidden);
  gate_up_kernel<T><<<ceil_div(s.intermediate, kWarps), kThreads, row_bytes, stream>>>(
      scratch.middle, static_cast<const T*>(in.post_norm), in.gate, in.up, scratch.gated, s.hidden, s.intermediate,
      s.eps);
  project_kernel<T><<<ceil_div(s.hidden, kWarps), kThreads, 0, stream>>>(
      scratch.gated, in.down, scratch.middle, static_cast<T*>(out.x), s.intermediate, s.hidden);
  return cudaGetLastError();
}

}  // namespace

size_t decode_workspace(const LayerShape& shape) {
  return with_dtype(shape.dtype, [&](auto zero) {
    Carver carver(nullptr);
    (void)carve<decltype(zero)>(shape, carver);
    return carver.used();
  });
}

cudaError_t run_decode_layer(const LayerShape& shape, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                             cudaStream_t stream) {
  return with_dtype(shape.dtype,
                    [&](auto zero) { return decode_layer<decltype(zero)>(shape, in, out, workspace, stream); });
}

cudaError_t run_embed(OpDtype dtype, int32_t width, int32_t hidden, const int32_t* ids, const void* table, void* out,
                      cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    embed_kernel<T><<<width, 128, 0, stream>>>(ids, static_cast<const T*>(table), static_cast<T*>(out), hidden);
    return cudaGetLastError();
  });
}

cudaError_t run_head(OpDtype dtype, int32_t width, int32_t hidden, int32_t vocab_size, float eps, const void* x,
                     const int32_t* num_tokens, const void* norm, const void* weight, float* logits,
                     void* hidden_states, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const size_t row_bytes = sizeof(T) * static_cast<size_t>(hidden);
    const cudaError_t code = allow_shared(head_kernel<T>, row_bytes);
    if (code != cudaSuccess) return code;
    const auto* rows = static_cast<const T*>(x);
    const auto* gain = static_cast<const T*>(norm);
    head_kernel<T><<<ceil_div(vocab_size, 2 * kWarps), 32 * kWarps, row_bytes, stream>>>(
        rows, num_tokens, gain, static_cast<const T*>(weight), logits, hidden, vocab_size, eps);
    if (width > 1) {
      rms_norm_kernel<T><<<width, 128, 0, stream>>>(rows, gain, static_cast<T*>(hidden_states), hidden, eps);
    }
    return cudaGetLastError();
  });
}

size_t layer_workspace(const LayerShape& shape) {
  return shape.width == 1 ? decode_workspace(shape) : block_workspace(shape);
}

cudaError_t run_layer(const LayerShape& shape, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                      cudaStream_t stream) {
  return shape.width == 1 ? run_decode_layer(shape, in, out, workspace, stream)
                          : run_block_layer(shape, in, out, workspace, stream);
}

}  // namespace lococo::trt
