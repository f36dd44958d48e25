// One token: matrix-vector products that read every weight once, at the speed of memory. Five kernels a layer: norm
// with q, k, v and rotation; attention; o_proj with the residual; norm with gate and up; down_proj with the residual.
#include <cfloat>

#include "trt/ops/common.cuh"

namespace lococo::trt {
namespace {

constexpr int kWarps = 4;  // of a matrix-vector block
constexpr int kAttentionThreads = 256;
constexpr int kMinChunk = 32;  // columns of an attention block
constexpr int kMaxChunks = 32;

// Dot products of `kRows` rows of a weight with x (n), by one warp; the sums are in every lane. All threads of a block
// come here: ready() waits for the kernel before and returns x, while the first weights are already on their way.
template <typename T, int kRows, int kAhead, typename Ready>
__device__ __forceinline__ void dot_rows(const T* const (&rows)[kRows], int n, Ready&& ready, float (&sums)[kRows]) {
  constexpr int kSize = Pack<T>::kSize;
  const int packs = n / kSize;
  const int lane = threadIdx.x % 32;
  Pack<T> weights[kAhead][kRows];
  const auto load = [&](int base) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = base + 32 * u + lane;
#pragma unroll
      for (int r = 0; r < kRows; ++r) weights[u][r] = i < packs ? Pack<T>::stream(rows[r] + i * kSize) : Pack<T>{};
    }
  };
  load(0);
  const T* x = ready();
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = 0.0f;
  for (int base = 0; base < packs; base += 32 * kAhead) {
    if (base > 0) load(base);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = base + 32 * u + lane;
      const Pack<T> v = i < packs ? Pack<T>::load(x + i * kSize) : Pack<T>{};
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] = dot(weights[u][r], v, sums[r]);
    }
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
  bool finish;            // rotate here; else norms of q and k come first
  uint32_t* chunks_done;  // [h], of attention: cleared here
};

// A warp makes the pair of channels i and i + d/2 of a head, which the rotation mixes.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) qkv_kernel(QkvArguments a) {
  const int half = a.head_dim / 2;
  const int pairs = (a.num_heads + 2 * a.num_kv_heads) * half;
  const int wanted = blockIdx.x * kWarps + threadIdx.x / 32;
  const int pair = min(wanted, pairs - 1);
  int head = pair / half;
  const int i = pair % half;
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
  const bool rotates = !is_value && a.finish;
  const int row = head * a.head_dim + i;
  const T* weight = static_cast<const T*>(linear.weight);
  const T* const rows[2] = {weight + static_cast<int64_t>(row) * a.hidden,
                            weight + static_cast<int64_t>(row + half) * a.hidden};
  float2 angle{};
  const auto ready = [&] {
    wait_for_previous();
    if (rotates) angle = rope_angle(a.rope, *a.position, i);
    if (blockIdx.x == 0) {
      for (int h = threadIdx.x; h < a.num_kv_heads; h += blockDim.x) a.chunks_done[h] = 0;
    }
    return normed(static_cast<const T*>(a.x), static_cast<const T*>(a.norm), a.hidden, a.eps);
  };
  float sums[2];
  dot_rows<T, 2, 4>(rows, a.hidden, ready, sums);
  if (threadIdx.x % 32 != 0 || wanted >= pairs) return;
  float2 channels = {with_bias<T>(sums[0], linear.bias, row), with_bias<T>(sums[1], linear.bias, row + half)};
  if (rotates) {
    channels = rotate<T>(channels.x, channels.y, angle);
    if (is_query) channels = {channels.x * a.scale, channels.y * a.scale};
  }
  to[row] = from_float<T>(channels.x);
  to[row + half] = from_float<T>(channels.y);
}

// In place: norm of each head of q and k, then the rotation. One warp a head.
template <typename T>
__global__ void norm_heads_kernel(QkvArguments a, const T* q_norm, const T* k_norm) {
  const int head = blockIdx.x;
  const bool is_query = head < a.num_heads;
  T* row = is_query ? static_cast<T*>(a.query) + head * a.head_dim
                    : static_cast<T*>(a.key) + (head - a.num_heads) * a.head_dim;
  const T* weight = is_query ? q_norm : k_norm;
  wait_for_previous();
  finish_head(row, row, weight, a.eps, a.rope, a.position, 0, is_query, a.head_dim, a.scale);
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
  float* weights;   // [h * g, c + 1]: exp(logit - the highest of its chunk)
  float* parts;     // [h * g, kMaxChunks, d]: what the chunk's weights make of its values
  float2* extents;  // [h * g, kMaxChunks]: the highest logit of a chunk, the sum of its weights
  uint32_t* chunks_done;
  int group, head_dim, capacity, chunk;
  float score_decay;
};

// A block a KV head with its g query heads, kGroup at a time, and a chunk of the columns that are seen: 0..L-1 of the
// cache, then the new one. The last block of a head joins the parts, in the order of the chunks.
// Shared memory: [kGroup][chunk] logits, then weights; [warps][kGroup][d] partial sums; [g][kMaxChunks] factors.
template <typename T, int kGroup>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(AttentionArguments a) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kAhead = 2;  // rows that a thread asks for before it needs the first
  constexpr int kWarpCount = kAttentionThreads / 32;
  extern __shared__ float shared[];
  __shared__ bool is_last;
  const int kv_head = blockIdx.x;
  const int d = a.head_dim;
  const int lanes = d / kSize;  // that share a row, a power of two
  const int lane = threadIdx.x % lanes;
  const int first = threadIdx.x / lanes;
  const int step = kAttentionThreads / lanes;  // columns at a time
  const int warp = threadIdx.x / 32;
  const int stride = a.capacity + 1;
  float* logits = shared;
  float* partial = logits + kGroup * a.chunk;
  float* factors = partial + kWarpCount * kGroup * d;
  wait_for_previous();
  const int length = *a.past_length;
  const int columns = length + 1;
  const int chunks = ceil_div(columns, a.chunk);
  const int start = static_cast<int>(blockIdx.y) * a.chunk;
  const int count = min(a.chunk, columns - start);
  if (count <= 0) return;

  // Beyond the last column: the last one again, to be ignored.
  const auto load = [&](const void* past, const void* fresh, int i) {
    const int column = start + i;
    const T* row = column < length
                       ? static_cast<const T*>(past) + (static_cast<int64_t>(kv_head) * a.capacity + column) * d
                       : static_cast<const T*>(fresh) + static_cast<int64_t>(kv_head) * d;
    return Pack<T>::load(row + lane * kSize);
  };

  for (int first_head = 0; first_head < a.group; first_head += kGroup) {
    const int64_t head = static_cast<int64_t>(kv_head) * a.group + first_head;
    Pack<T> query[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      query[g] = Pack<T>::load(static_cast<const T*>(a.query) + (head + g) * d + lane * kSize);
    }
    Pack<T> values[kAhead];
    // All threads take every turn: the shuffles are of whole warps.
    for (int base = 0; base < count; base += kAhead * step) {
      Pack<T> keys[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) keys[u] = load(a.past_key, a.new_key, base + u * step + first);
      if (base == 0) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) values[u] = load(a.past_value, a.new_value, u * step + first);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (base + u * step >= count) break;
        const int i = base + u * step + first;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          float sum = dot(query[g], keys[u], 0.0f);
          for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
          if (i < count && lane == 0) logits[g * a.chunk + i] = rounded<T>(sum);
        }
      }
    }
    __syncthreads();

    if (warp < kGroup) {  // softmax of the chunk: a warp a query head
      float* row = logits + warp * a.chunk;
      float highest = -FLT_MAX;
      for (int i = threadIdx.x % 32; i < count; i += 32) highest = fmaxf(highest, row[i]);
      highest = warp_max(highest);
      float sum = 0.0f;
      for (int i = threadIdx.x % 32; i < count; i += 32) {
        row[i] = exponential<T>(row[i] - highest);
        sum += row[i];
        a.weights[(head + warp) * stride + start + i] = row[i];
      }
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) a.extents[(head + warp) * kMaxChunks + blockIdx.y] = {highest, sum};
    }
    __syncthreads();

    float sums[kGroup][kSize] = {};
    for (int base = 0; base < count; base += kAhead * step) {
      if (base > 0) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) values[u] = load(a.past_value, a.new_value, base + u * step + first);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int i = base + u * step + first;
        if (i >= count) continue;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          const float weight = logits[g * a.chunk + i];
#pragma unroll
          for (int j = 0; j < kSize; ++j) sums[g][j] = fmaf(weight, values[u].get(j), sums[g][j]);
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
    for (int i = threadIdx.x; i < kGroup * d; i += kAttentionThreads) {
      float part = 0.0f;
#pragma unroll
      for (int other = 0; other < kWarpCount; ++other) part += partial[other * kGroup * d + i];
      a.parts[((head + i / d) * kMaxChunks + blockIdx.y) * d + i % d] = part;
    }
    __syncthreads();
  }

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(a.chunks_done + kv_head, 1u) == static_cast<unsigned>(chunks) - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  // Other blocks wrote what follows: read past the first-level cache, and all on its way before the first is needed.
  constexpr int kColumns = 4;  // of a thread at a time
  const int64_t all_heads = static_cast<int64_t>(kv_head) * a.group;
  float part[kMaxChunks];
  const auto load_parts = [&](int i) {
    const float* from = a.parts + (all_heads + i / d) * kMaxChunks * d + i % d;
#pragma unroll
    for (int j = 0; j < kMaxChunks; ++j) part[j] = j < chunks && i < a.group * d ? __ldcg(from + j * d) : 0.0f;
  };
  float weight[kGroup][kColumns];
  const auto column_of = [&](int i) { return i < length ? i : i == a.capacity ? length : -1; };
  const auto load_weights = [&](int first_head, int base) {
#pragma unroll
    for (int u = 0; u < kColumns; ++u) {
      const int column = column_of(base + u * kAttentionThreads);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        weight[g][u] = column >= 0 ? __ldcg(a.weights + (all_heads + first_head + g) * stride + column) : 0.0f;
      }
    }
  };
  const int mine = threadIdx.x;
  load_parts(mine);
  load_weights(0, mine);
  for (int g = warp; g < a.group; g += kWarpCount) {
    const int i = threadIdx.x % 32;
    const float2 extent = i < chunks ? __ldcg(a.extents + (all_heads + g) * kMaxChunks + i) : float2{-FLT_MAX, 0.0f};
    const float factor = exponential<T>(extent.x - warp_max(extent.x));
    factors[g * kMaxChunks + i] = factor / warp_sum(extent.y * factor);
  }
  __syncthreads();
  for (int i = mine; i < a.group * d; i += kAttentionThreads) {
    if (i != mine) load_parts(i);
    float out = 0.0f;
#pragma unroll
    for (int j = 0; j < kMaxChunks; ++j) out = fmaf(factors[i / d * kMaxChunks + j], part[j], out);
    static_cast<T*>(a.out)[all_heads * d + i] = from_float<T>(out);
  }
  // What each column collects: float32 probabilities, summed over the group.
  for (int base = mine; base < stride; base += kColumns * kAttentionThreads) {
    float collected[kColumns] = {};
    for (int first_head = 0; first_head < a.group; first_head += kGroup) {
      if (base != mine || first_head != 0) load_weights(first_head, base);
#pragma unroll
      for (int u = 0; u < kColumns; ++u) {
        const int chunk = max(column_of(base + u * kAttentionThreads), 0) / a.chunk;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          collected[u] = fmaf(weight[g][u], factors[(first_head + g) * kMaxChunks + chunk], collected[u]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kColumns; ++u) {
      const int i = base + u * kAttentionThreads;
      if (i >= stride) break;
      if (a.past_scores != nullptr && i < a.capacity) {
        collected[u] += a.score_decay * a.past_scores[static_cast<int64_t>(kv_head) * a.capacity + i];
      }
      a.scores[static_cast<int64_t>(kv_head) * stride + i] = collected[u];
    }
  }
}

// out = residual + x W^T: one row a warp.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    project_kernel(const T* x, Linear linear, const T* residual, T* out, int in_size, int out_size) {
  const int wanted = blockIdx.x * kWarps + threadIdx.x / 32;
  const int row = min(wanted, out_size - 1);
  const T* const rows[1] = {static_cast<const T*>(linear.weight) + static_cast<int64_t>(row) * in_size};
  float past = 0.0f;
  const auto ready = [&] {
    wait_for_previous();
    past = to_float(residual[row]);
    return x;
  };
  float sums[1];
  dot_rows<T, 1, 8>(rows, in_size, ready, sums);
  if (threadIdx.x % 32 == 0 && wanted < out_size) {
    out[row] = from_float<T>(past + with_bias<T>(sums[0], linear.bias, row));
  }
}

// silu(gate) * up of the norm of x.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    gate_up_kernel(const T* x, const T* norm, Linear gate, Linear up, T* out, int hidden, int intermediate, float eps) {
  const int wanted = blockIdx.x * kWarps + threadIdx.x / 32;
  const int row = min(wanted, intermediate - 1);
  const int64_t start = static_cast<int64_t>(row) * hidden;
  const T* const rows[2] = {static_cast<const T*>(gate.weight) + start, static_cast<const T*>(up.weight) + start};
  const auto ready = [&] {
    wait_for_previous();
    return normed(x, norm, hidden, eps);
  };
  float sums[2];
  dot_rows<T, 2, 4>(rows, hidden, ready, sums);
  if (threadIdx.x % 32 != 0 || wanted >= intermediate) return;
  const float g = with_bias<T>(sums[0], gate.bias, row);
  out[row] = from_float<T>(silu<T>(g) * with_bias<T>(sums[1], up.bias, row));
}

constexpr int kHeadRows = 4;  // logits of a warp

// Logits of one row of x; the row is token num_tokens - 1.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    head_kernel(const T* x, const int32_t* num_tokens, const T* norm, const T* weight, float* logits, int hidden,
                int vocab_size, float eps) {
  const int first = kHeadRows * (static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32);
  const T* rows[kHeadRows];
#pragma unroll
  for (int r = 0; r < kHeadRows; ++r) rows[r] = weight + static_cast<int64_t>(min(first + r, vocab_size - 1)) * hidden;
  const auto ready = [&] {
    wait_for_previous();
    const int64_t token = num_tokens == nullptr ? 0 : *num_tokens - 1;
    return normed(x + token * hidden, norm, hidden, eps);
  };
  float sums[kHeadRows];
  dot_rows<T, kHeadRows, 4>(rows, hidden, ready, sums);
#pragma unroll
  for (int r = 0; r < kHeadRows; ++r) {
    if (static_cast<int>(threadIdx.x) % 32 == r && first + r < vocab_size) logits[first + r] = rounded<T>(sums[r]);
  }
}

template <typename T>
__global__ void embed_kernel(const int32_t* ids, const T* table, T* out, int hidden) {
  constexpr int kSize = Pack<T>::kSize;
  wait_for_previous();
  const T* row = table + static_cast<int64_t>(ids[blockIdx.x]) * hidden;
  T* to = out + static_cast<int64_t>(blockIdx.x) * hidden;
  for (int i = threadIdx.x; i < hidden / kSize; i += blockDim.x) Pack<T>::load(row + i * kSize).store(to + i * kSize);
}

// In slices of the largest group that divides the heads and that the registers hold.
template <typename T, int kGroup = 8>
void attention(const AttentionArguments& a, int num_kv_heads, Launcher& launch) {
  if constexpr (kGroup > 1) {
    if (a.group % kGroup != 0) return attention<T, kGroup - 1>(a, num_kv_heads, launch);
  }
  const size_t floats = kGroup * (a.chunk + kAttentionThreads / 32 * a.head_dim) + a.group * kMaxChunks;
  const dim3 grid(num_kv_heads, ceil_div(a.capacity + 1, a.chunk));
  launch(attention_kernel<T, kGroup>, grid, kAttentionThreads, sizeof(float) * floats, a);
}

int chunk_of(const LayerShape& s) { return ceil_div(ceil_div(s.capacity + 1, kMaxChunks), kMinChunk) * kMinChunk; }

template <typename T>
struct Scratch {
  T* query;     // [heads, d]
  T* attended;  // [heads, d]
  T* middle;    // [hidden], after attention
  T* gated;     // [intermediate]
  float* weights;
  float* parts;
  float2* extents;
  uint32_t* chunks_done;
};

template <typename T>
Scratch<T> carve(const LayerShape& s, Carver& carver) {
  const auto heads = static_cast<size_t>(s.num_heads);
  const auto d = static_cast<size_t>(s.head_dim);
  return {carver.take<T>(heads * d),
          carver.take<T>(heads * d),
          carver.take<T>(s.hidden),
          carver.take<T>(s.intermediate),
          carver.take<float>(heads * (s.capacity + 1)),
          carver.take<float>(heads * kMaxChunks * d),
          carver.take<float2>(heads * kMaxChunks),
          carver.take<uint32_t>(s.num_kv_heads)};
}

template <typename T>
cudaError_t decode_layer(const LayerShape& s, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                         cudaStream_t stream) {
  Carver carver(workspace);
  const Scratch<T> scratch = carve<T>(s, carver);
  const auto* x = static_cast<const T*>(in.x);
  const size_t row_bytes = sizeof(T) * static_cast<size_t>(s.hidden);
  constexpr int kThreads = 32 * kWarps;
  Launcher launch(stream, true);

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
                            rounded_scale(s.dtype, s.head_dim),
                            in.q_norm == nullptr,
                            scratch.chunks_done};
  const int pairs = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim / 2;
  launch(qkv_kernel<T>, ceil_div(pairs, kWarps), kThreads, row_bytes, qkv);
  if (in.q_norm != nullptr) {
    launch(norm_heads_kernel<T>, s.num_heads + s.num_kv_heads, 32, 0, qkv, static_cast<const T*>(in.q_norm),
           static_cast<const T*>(in.k_norm));
  }
  const AttentionArguments a = {scratch.query,       in.past_key,
                                in.past_value,       out.key,
                                out.value,           in.past_scores,
                                scratch.attended,    out.scores,
                                in.past_length,      scratch.weights,
                                scratch.parts,       scratch.extents,
                                scratch.chunks_done, s.num_heads / s.num_kv_heads,
                                s.head_dim,          s.capacity,
                                chunk_of(s),         s.score_decay};
  attention<T>(a, s.num_kv_heads, launch);
  launch(project_kernel<T>, ceil_div(s.hidden, kWarps), kThreads, 0, scratch.attended, in.o, x, scratch.middle,
         s.num_heads * s.head_dim, s.hidden);
  launch(gate_up_kernel<T>, ceil_div(s.intermediate, kWarps), kThreads, row_bytes, scratch.middle,
         static_cast<const T*>(in.post_norm), in.gate, in.up, scratch.gated, s.hidden, s.intermediate, s.eps);
  launch(project_kernel<T>, ceil_div(s.hidden, kWarps), kThreads, 0, scratch.gated, in.down, scratch.middle,
         static_cast<T*>(out.x), s.intermediate, s.hidden);
  return launch.code();
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
    Launcher launch(stream, width == 1);
    launch(embed_kernel<T>, width, 128, 0, ids, static_cast<const T*>(table), static_cast<T*>(out), hidden);
    return launch.code();
  });
}

cudaError_t run_head(OpDtype dtype, int32_t width, int32_t hidden, int32_t vocab_size, float eps, const void* x,
                     const int32_t* num_tokens, const void* norm, const void* weight, float* logits,
                     void* hidden_states, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto* rows = static_cast<const T*>(x);
    const auto* gain = static_cast<const T*>(norm);
    Launcher launch(stream, width == 1);
    launch(head_kernel<T>, ceil_div(vocab_size, kHeadRows * kWarps), 32 * kWarps,
           sizeof(T) * static_cast<size_t>(hidden), rows, num_tokens, gain, static_cast<const T*>(weight), logits,
           hidden, vocab_size, eps);
    if (width > 1) {
      launch(rms_norm_kernel<T>, width, 128, 0, rows, gain, static_cast<T*>(hidden_states), hidden, eps);
    }
    return launch.code();
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
