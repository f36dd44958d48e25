// A block of tokens: products on tensor cores, attention with its probabilities in memory, because every column's score
// is a sum over all queries. The sums are made in a fixed order: the same input gives the same bits.
#include <cfloat>

#include "trt/ops/gemm.cuh"

namespace lococo::trt {
namespace {

// x [M, K] times a stack of weights, [N, K] in all: out [M, N], or a residual added.
template <typename T>
struct LinearArguments {
  const T* x;
  Stack<T> weights;
  const void* bias[3];
  const T* residual;  // [M, N], or NULL
  T* out;
  float* out_float;  // instead of out, if not NULL
  int M, N, K;
};

template <typename T>
__global__ void __launch_bounds__(kGemmThreads) linear_kernel(LinearArguments<T> p) {
  gemm_tile<T, true>(
      p.M, p.N, p.K, blockIdx.y * kTile, blockIdx.x * kTile, [&](int m) { return p.x + static_cast<int64_t>(m) * p.K; },
      [&](int n, int k) { return p.weights.at(0, n, k); },
      [&](int m, int n, float sum) {
        const int part = p.weights.part_of(n);
        const auto* bias = static_cast<const T*>(p.bias[part]);
        if (bias != nullptr) sum += to_float(bias[n - p.weights.start[part]]);
        const int64_t i = static_cast<int64_t>(m) * p.N + n;
        if (p.residual != nullptr) sum = to_float(p.residual[i]) + rounded<T>(sum);
        if (p.out_float != nullptr) {
          p.out_float[i] = rounded<T>(sum);
        } else {
          p.out[i] = from_float<T>(sum);
        }
      });
}

template <typename T>
cudaError_t linear(const LinearArguments<T>& p, cudaStream_t stream) {
  return launch_gemm<T>(linear_kernel<T>, dim3(ceil_div(p.N, kTile), ceil_div(p.M, kTile)), p, stream);
}

template <typename T>
Stack<T> stacked(int stride, const void* a, int rows_a = INT_MAX, const void* b = nullptr, int rows_b = INT_MAX,
                 const void* c = nullptr) {
  const int second = b == nullptr ? INT_MAX : rows_a;
  const int third = c == nullptr ? INT_MAX : rows_a + rows_b;
  return {{static_cast<const T*>(a), static_cast<const T*>(b), static_cast<const T*>(c)},
          {0, second, third},
          {0, 0, 0},
          stride};
}

// qkv (w, heads of q, k, v) to query [heads, w, d], key and value [h, w, d]; norms, rotation and scale on the way.
template <typename T>
struct HeadsArguments {
  const T* qkv;
  T* query;
  T* key;
  T* value;
  const T* q_norm;  // [d], or NULL
  const T* k_norm;
  const int32_t* position;
  Rope rope;
  int width, num_heads, num_kv_heads, head_dim;
  float eps, scale;
};

template <typename T>
__global__ void heads_kernel(HeadsArguments<T> p) {  // a warp a token and head
  const int token = blockIdx.x;
  const int all_heads = p.num_heads + 2 * p.num_kv_heads;
  const int d = p.head_dim;
  const int half = d / 2;
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < all_heads; head += blockDim.x / 32) {
    const T* from = p.qkv + (static_cast<int64_t>(token) * all_heads + head) * d;
    const bool is_query = head < p.num_heads;
    const int kv_head = (head - p.num_heads) % p.num_kv_heads;
    const bool is_value = head >= p.num_heads + p.num_kv_heads;
    T* to = is_query ? p.query + (static_cast<int64_t>(head) * p.width + token) * d
                     : (is_value ? p.value : p.key) + (static_cast<int64_t>(kv_head) * p.width + token) * d;
    if (is_value) {
      for (int i = lane; i < d; i += 32) to[i] = from[i];
      continue;
    }
    const T* norm = is_query ? p.q_norm : p.k_norm;
    float root = 1.0f;
    if (norm != nullptr) {
      float sum = 0.0f;
      for (int i = lane; i < d; i += 32) sum += to_float(from[i]) * to_float(from[i]);
      root = sqrtf(warp_sum(sum) / static_cast<float>(d) + p.eps);
    }
    const auto channel = [&](int i) {
      const float x = to_float(from[i]);
      return norm == nullptr ? x : rounded<T>(rounded<T>(x / root) * to_float(norm[i]));
    };
    for (int i = lane; i < half; i += 32) {
      float2 pair = rotate<T>(channel(i), channel(i + half), rope_angle(p.rope, *p.position + token, i));
      if (is_query) pair = {pair.x * p.scale, pair.y * p.scale};
      to[i] = from_float<T>(pair.x);
      to[i + half] = from_float<T>(pair.y);
    }
  }
}

// Shapes of attention of a block: heads of w queries, s = c + w columns, rows of logits `stride` long.
template <typename T>
struct AttentionArguments {
  const T* query;  // [heads, w, d]
  Stack<T> keys;   // batch: KV head
  Stack<T> values;
  float* logits;     // [heads, w, stride]
  T* probabilities;  // [heads, w, stride], columns from s on unused
  T* out;            // [w, heads, d]
  float* scores;     // [h, s]
  const float* past_scores;
  const int32_t* past_length;
  const int32_t* num_tokens;
  int width, num_heads, group, head_dim, capacity, columns, stride;
  float score_decay;
  bool decay_per_token;
};

template <typename T>
__global__ void __launch_bounds__(kGemmThreads) logits_kernel(AttentionArguments<T> p) {
  const int head = blockIdx.z;
  const int kv_head = head / p.group;
  const int n0 = blockIdx.x * kTile;
  const int length = *p.past_length;
  // Tiles of dead cache columns, and of tokens after every query of the tile, stay unwritten: nobody reads them.
  if (n0 + kTile <= p.capacity && n0 >= length) return;
  if (n0 - p.capacity > static_cast<int>(blockIdx.y) * kTile + kTile - 1) return;
  const int64_t first = static_cast<int64_t>(head) * p.width;
  gemm_tile<T, true>(
      p.width, p.columns, p.head_dim, blockIdx.y * kTile, n0, [&](int m) { return p.query + (first + m) * p.head_dim; },
      [&](int n, int k) { return p.keys.at(kv_head, n, k); },
      [&](int m, int n, float sum) { p.logits[(first + m) * p.stride + n] = rounded<T>(sum); });
}

// Logits become float32 probabilities, and rounded ones beside them. A warp a row; it reads what it sees: live cache
// columns, and new ones up to its own.
template <typename T>
__global__ void softmax_kernel(AttentionArguments<T> p) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= p.num_heads * p.width) return;
  const int lane = threadIdx.x % 32;
  const int length = *p.past_length;
  const int seen_new = row % p.width + 1;
  float* logits = p.logits + static_cast<int64_t>(row) * p.stride;
  T* out = p.probabilities + static_cast<int64_t>(row) * p.stride;
  float highest = -FLT_MAX;
  for (int i = lane; i < length; i += 32) highest = fmaxf(highest, logits[i]);
  for (int i = lane; i < seen_new; i += 32) highest = fmaxf(highest, logits[p.capacity + i]);
  highest = warp_max(highest);
  float sum = 0.0f;
  const auto weigh = [&](int first, int count) {
    for (int i = first + lane; i < first + count; i += 32) {
      logits[i] = expf(logits[i] - highest);
      sum += logits[i];
    }
  };
  weigh(0, length);
  weigh(p.capacity, seen_new);
  const float share = 1.0f / warp_sum(sum);
  const auto write = [&](int first, int count, int end) {
    for (int i = first + lane; i < first + count; i += 32) {
      logits[i] *= share;
      out[i] = from_float<T>(logits[i]);
    }
    for (int i = first + count + lane; i < end; i += 32) out[i] = from_float<T>(0.0f);
  };
  write(0, length, p.capacity);
  write(p.capacity, seen_new, p.stride);
}

// Scores of 32 columns: float32 probabilities summed over real queries and the group, by age if decay_per_token.
template <typename T>
__global__ void __launch_bounds__(1024) scores_kernel(AttentionArguments<T> p) {
  __shared__ float partial[32][33];
  const int kv_head = blockIdx.y;
  const int column = blockIdx.x * 32 + threadIdx.x;
  const int count = *p.num_tokens;
  float sum = 0.0f;
  if (column < p.columns && (column >= p.capacity || column < *p.past_length)) {
    const int first = max(column - p.capacity, 0);  // query that sees the column
    for (int g = 0; g < p.group; ++g) {
      const float* logits = p.logits + static_cast<int64_t>(kv_head * p.group + g) * p.width * p.stride + column;
      if (p.decay_per_token) {
        for (int q = first + threadIdx.y; q < count; q += 32) {
          const float weight = powf(p.score_decay, static_cast<float>(count - 1 - q));
          sum = fmaf(weight, logits[static_cast<int64_t>(q) * p.stride], sum);
        }
        continue;
      }
#pragma unroll 4
      for (int q = first + threadIdx.y; q < count; q += 32) sum += logits[static_cast<int64_t>(q) * p.stride];
    }
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.columns) return;
  for (int i = 1; i < 32; ++i) sum += partial[i][threadIdx.x];
  if (p.past_scores != nullptr && column < p.capacity) {
    const float decay = p.decay_per_token ? powf(p.score_decay, static_cast<float>(count)) : p.score_decay;
    sum += decay * p.past_scores[static_cast<int64_t>(kv_head) * p.capacity + column];
  }
  p.scores[static_cast<int64_t>(kv_head) * p.columns + column] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kGemmThreads) values_kernel(AttentionArguments<T> p) {
  const int head = blockIdx.z;
  const int kv_head = head / p.group;
  const int64_t first = static_cast<int64_t>(head) * p.width;
  // stride, not columns: a multiple of 16 bytes; the probabilities there are zero, the rows are clamped.
  gemm_tile<T, false>(
      p.width, p.head_dim, p.stride, blockIdx.y * kTile, blockIdx.x * kTile,
      [&](int m) { return p.probabilities + (first + m) * p.stride; },
      [&](int k, int n) { return p.values.at(kv_head, min(k, p.columns - 1), n); },
      [&](int m, int n, float sum) {
        p.out[(static_cast<int64_t>(m) * p.num_heads + head) * p.head_dim + n] = from_float<T>(sum);
      });
}

// silu(gate) * up: x [w, 2 * intermediate] to [w, intermediate].
template <typename T>
__global__ void silu_kernel(const T* x, T* out, int intermediate) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t row = blockIdx.y;
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * kSize;
  if (i >= intermediate) return;
  const Pack<T> gate = Pack<T>::load(x + row * 2 * intermediate + i);
  const Pack<T> up = Pack<T>::load(x + (row * 2 + 1) * intermediate + i);
  Pack<T> y;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const float g = gate.get(j);
    y.set(j, rounded<T>(g * rounded<T>(1.0f / (1.0f + expf(-g)))) * up.get(j));
  }
  y.store(out + row * intermediate + i);
}

int logits_stride(const LayerShape& s) { return ceil_div(s.capacity + s.width, 8) * 8; }

template <typename T>
struct Scratch {
  T* normed;      // [w, hidden]
  T* qkv;         // [w, heads + 2h, d]
  T* query;       // [heads, w, d]
  float* logits;  // [heads, w, stride]
  T* probabilities;
  T* attended;  // [w, heads, d]
  T* middle;    // [w, hidden]
  T* both;      // [w, 2 * intermediate]
  T* gated;     // [w, intermediate]
};

template <typename T>
Scratch<T> carve(const LayerShape& s, Carver& c) {
  const auto w = static_cast<size_t>(s.width);
  const size_t heads = w * s.num_heads;
  const size_t stride = logits_stride(s);
  Scratch<T> r;
  r.normed = c.take<T>(w * s.hidden);
  r.qkv = c.take<T>((heads + 2 * w * s.num_kv_heads) * s.head_dim);
  r.query = c.take<T>(heads * s.head_dim);
  r.logits = c.take<float>(heads * stride);
  r.probabilities = c.take<T>(heads * stride);
  r.attended = c.take<T>(heads * s.head_dim);
  r.middle = c.take<T>(w * s.hidden);
  r.both = c.take<T>(2 * w * s.intermediate);
  r.gated = c.take<T>(w * s.intermediate);
  return r;
}

template <typename T>
cudaError_t block_layer(const LayerShape& s, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                        cudaStream_t stream) {
  Carver carver(workspace);
  const Scratch<T> r = carve<T>(s, carver);
  const auto* x = static_cast<const T*>(in.x);
  const int w = s.width;
  const int q_size = s.num_heads * s.head_dim;
  const int kv_size = s.num_kv_heads * s.head_dim;
  rms_norm_kernel<T><<<w, 128, 0, stream>>>(x, static_cast<const T*>(in.input_norm), r.normed, s.hidden, s.eps);
  cudaError_t code = linear<T>({r.normed,
                                stacked<T>(s.hidden, in.q.weight, q_size, in.k.weight, kv_size, in.v.weight),
                                {in.q.bias, in.k.bias, in.v.bias},
                                nullptr,
                                r.qkv,
                                nullptr,
                                w,
                                q_size + 2 * kv_size,
                                s.hidden},
                               stream);
  if (code != cudaSuccess) return code;
  heads_kernel<T><<<w, 256, 0, stream>>>({r.qkv, r.query, static_cast<T*>(out.key), static_cast<T*>(out.value),
                                          static_cast<const T*>(in.q_norm), static_cast<const T*>(in.k_norm),
                                          in.position, make_rope(s, in), w, s.num_heads, s.num_kv_heads, s.head_dim,
                                          s.eps, rounded_scale(s.dtype, s.head_dim)});

  const int columns = s.capacity + w;
  const auto cache = [&](const void* past, const void* fresh) {
    Stack<T> stack = stacked<T>(s.head_dim, past, s.capacity, fresh);
    stack.batch_stride[0] = static_cast<int64_t>(s.capacity) * s.head_dim;
    stack.batch_stride[1] = static_cast<int64_t>(w) * s.head_dim;
    return stack;
  };
  const AttentionArguments<T> a = {r.query,
                                   cache(in.past_key, out.key),
                                   cache(in.past_value, out.value),
                                   r.logits,
                                   r.probabilities,
                                   r.attended,
                                   out.scores,
                                   in.past_scores,
                                   in.past_length,
                                   in.num_tokens,
                                   w,
                                   s.num_heads,
                                   s.num_heads / s.num_kv_heads,
                                   s.head_dim,
                                   s.capacity,
                                   columns,
                                   logits_stride(s),
                                   s.score_decay,
                                   s.decay_per_token};
  const int row_tiles = ceil_div(w, kTile);
  code = launch_gemm<T>(logits_kernel<T>, dim3(ceil_div(columns, kTile), row_tiles, s.num_heads), a, stream);
  if (code != cudaSuccess) return code;
  softmax_kernel<T><<<ceil_div(s.num_heads * w, 4), 128, 0, stream>>>(a);
  scores_kernel<T><<<dim3(ceil_div(columns, 32), s.num_kv_heads), dim3(32, 32), 0, stream>>>(a);
  code = launch_gemm<T>(values_kernel<T>, dim3(ceil_div(s.head_dim, kTile), row_tiles, s.num_heads), a, stream);
  if (code != cudaSuccess) return code;

  code = linear<T>(
      {r.attended, stacked<T>(q_size, in.o.weight), {in.o.bias}, x, r.middle, nullptr, w, s.hidden, q_size}, stream);
  if (code != cudaSuccess) return code;
  rms_norm_kernel<T><<<w, 128, 0, stream>>>(r.middle, static_cast<const T*>(in.post_norm), r.normed, s.hidden, s.eps);
  code = linear<T>({r.normed,
                    stacked<T>(s.hidden, in.gate.weight, s.intermediate, in.up.weight),
                    {in.gate.bias, in.up.bias},
                    nullptr,
                    r.both,
                    nullptr,
                    w,
                    2 * s.intermediate,
                    s.hidden},
                   stream);
  if (code != cudaSuccess) return code;
  silu_kernel<T>
      <<<dim3(ceil_div(s.intermediate, 128 * Pack<T>::kSize), w), 128, 0, stream>>>(r.both, r.gated, s.intermediate);
  return linear<T>({r.gated,
                    stacked<T>(s.intermediate, in.down.weight),
                    {in.down.bias},
                    r.middle,
                    static_cast<T*>(out.x),
                    nullptr,
                    w,
                    s.hidden,
                    s.intermediate},
                   stream);
}

}  // namespace

size_t block_workspace(const LayerShape& shape) {
  return with_dtype(shape.dtype, [&](auto zero) {
    Carver carver(nullptr);
    (void)carve<decltype(zero)>(shape, carver);
    return carver.used();
  });
}

cudaError_t run_block_layer(const LayerShape& shape, const LayerInputs& in, const LayerOutputs& out, void* workspace,
                            cudaStream_t stream) {
  return with_dtype(shape.dtype,
                    [&](auto zero) { return block_layer<decltype(zero)>(shape, in, out, workspace, stream); });
}

cudaError_t run_lm_head(OpDtype dtype, int32_t width, int32_t hidden, int32_t vocab_size, const void* hidden_states,
                        const void* weight, float* logits, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return linear<T>({static_cast<const T*>(hidden_states),
                      stacked<T>(hidden, weight),
                      {},
                      nullptr,
                      nullptr,
                      logits,
                      width,
                      vocab_size,
                      hidden},
                     stream);
  });
}

}  // namespace lococo::trt
