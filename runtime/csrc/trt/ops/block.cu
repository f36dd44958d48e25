// A block of tokens: products on tensor cores. Attention makes its logits twice, because every column's score is a sum
// over all queries of probabilities that are known only after a first look at the whole row; neither logits nor
// probabilities reach memory. The sums are made in a fixed order: the same input gives the same bits.
#include <cfloat>
#include <climits>
#include <type_traits>

#include "trt/ops/gemm.cuh"

namespace lococo::trt {
namespace {

// Up to three weights, one below the other, as q, k and v.
struct Stack {
  Linear part[3];
  int start[3];  // first row of each; INT_MAX for none

  __device__ __forceinline__ int part_of(int row) const { return row >= start[2] ? 2 : row >= start[1] ? 1 : 0; }
};

// x [M, K] times weights [N, K]: out [M, N], or a residual added.
template <typename T>
struct LinearArguments {
  const T* x;
  Stack weights;
  const T* residual;  // [M, N], or NULL
  T* out;
  float* out_float;  // instead of out, if not NULL
  int M, N, K;
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kGemmThreads) linear_kernel(const __grid_constant__ LinearArguments<T> p) {
  constexpr int kSize = Pack<T>::kSize;
  gemm_tile<T, true, kRows, kTile>(
      p.M, p.N, p.K, blockIdx.y * kRows, blockIdx.x * kTile, [&](int m) { return p.x + static_cast<int64_t>(m) * p.K; },
      [&](int n, int k) {
        const int part = p.weights.part_of(n);
        const int64_t row = n - p.weights.start[part];
        return static_cast<const T*>(p.weights.part[part].weight) + row * p.K + k;
      },
      [&](int m, int n, const float* sums) {
        const int64_t start = static_cast<int64_t>(m) * p.N + n;
        if (p.out_float != nullptr) {  // logits: N is any number
          for (int j = 0; j < kSize && n + j < p.N; ++j) p.out_float[start + j] = rounded<T>(sums[j]);
          return;
        }
        const int part = p.weights.part_of(n);
        const auto* bias = static_cast<const T*>(p.weights.part[part].bias);
        Pack<T> more{};
        Pack<T> past{};
        if (bias != nullptr) more = Pack<T>::load(bias + n - p.weights.start[part]);
        if (p.residual != nullptr) past = Pack<T>::load(p.residual + start);
        Pack<T> y;
#pragma unroll
        for (int j = 0; j < kSize; ++j) y.set(j, past.get(j) + rounded<T>(sums[j] + more.get(j)));
        y.store(p.out + start);
      });
}

// body(rows), a constant: the tallest tiles that give every multiprocessor work, because they read the least.
template <typename F>
void with_tile_rows(int columns, int M, const Launcher& launch, F&& body) {
  const auto fills = [&](int rows) { return columns * ceil_div(M, rows) >= launch.multiprocessors(); };
  if (fills(128)) return body(std::integral_constant<int, 128>());
  if (fills(64)) return body(std::integral_constant<int, 64>());
  body(std::integral_constant<int, 32>());
}

template <typename T>
void linear(const LinearArguments<T>& p, Launcher& launch) {
  const int columns = ceil_div(p.N, kTile);
  with_tile_rows(columns, p.M, launch, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    launch(linear_kernel<T, kRows>, dim3(columns, ceil_div(p.M, kRows)), kGemmThreads, GemmTile<T, kRows>::kBytes, p);
  });
}

// out [M, I] = silu(gate) * up of x [M, K].
template <typename T>
struct GateUpArguments {
  const T* x;
  Linear gate, up;
  T* out;
  int M, I, K;
};

// Half of a tile's columns are gates, the other half what they let through.
template <typename T, int kRows>
__global__ void __launch_bounds__(kGemmThreads) gate_up_kernel(GateUpArguments<T> p) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kHalf = kTile / 2;
  const int n0 = blockIdx.x * kTile;
  const int i0 = blockIdx.x * kHalf;
  gemm_tile<T, true, kRows, kTile / 2>(
      p.M, n0 + kTile, p.K, blockIdx.y * kRows, n0, [&](int m) { return p.x + static_cast<int64_t>(m) * p.K; },
      [&](int n, int k) {
        const int64_t row = min(i0 + (n - n0) % kHalf, p.I - 1);
        return static_cast<const T*>(n - n0 < kHalf ? p.gate.weight : p.up.weight) + row * p.K + k;
      },
      [&](int m, int n, const float* sums) {
        const int i = i0 + n - n0;
        if (i >= p.I) return;
        Pack<T> gate_bias{};
        Pack<T> up_bias{};
        if (p.gate.bias != nullptr) gate_bias = Pack<T>::load(static_cast<const T*>(p.gate.bias) + i);
        if (p.up.bias != nullptr) up_bias = Pack<T>::load(static_cast<const T*>(p.up.bias) + i);
        Pack<T> y;
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const float g = rounded<T>(sums[j] + gate_bias.get(j));
          y.set(j, silu<T>(g) * rounded<T>(sums[kHalf + j] + up_bias.get(j)));
        }
        y.store(p.out + static_cast<int64_t>(m) * p.I + i);
      });
}

template <typename T>
void gate_up(const GateUpArguments<T>& p, Launcher& launch) {
  const int columns = ceil_div(p.I, kTile / 2);
  with_tile_rows(columns, p.M, launch, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    launch(gate_up_kernel<T, kRows>, dim3(columns, ceil_div(p.M, kRows)), kGemmThreads, GemmTile<T, kRows>::kBytes, p);
  });
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
  for (int head = threadIdx.x / 32; head < all_heads; head += blockDim.x / 32) {
    const T* from = p.qkv + (static_cast<int64_t>(token) * all_heads + head) * d;
    const bool is_query = head < p.num_heads;
    const int kv_head = (head - p.num_heads) % p.num_kv_heads;
    const bool is_value = head >= p.num_heads + p.num_kv_heads;
    T* to = is_query ? p.query + (static_cast<int64_t>(head) * p.width + token) * d
                     : (is_value ? p.value : p.key) + (static_cast<int64_t>(kv_head) * p.width + token) * d;
    if (is_value) {
      for (int i = threadIdx.x % 32; i < d; i += 32) to[i] = from[i];
      continue;
    }
    const T* norm = is_query ? p.q_norm : p.k_norm;
    finish_head(from, to, norm, p.eps, p.rope, p.position, token, is_query, d, p.scale);
  }
}

// Attention of a block: heads of w queries, s = c + w columns.
template <typename T>
struct AttentionArguments {
  const T* query;     // [heads, w, d], scaled
  const T* past_key;  // [h, c, d]
  const T* past_value;
  const T* new_key;  // [h, w, d]
  const T* new_value;
  T* out;            // [w, heads, d]
  float* collected;  // [heads, row tiles, s]: what a column gets from the queries of a tile
  float* scores;     // [h, s]
  const float* past_scores;
  const int32_t* past_length;
  const int32_t* num_tokens;
  int width, num_heads, group, head_dim, capacity;
  float score_decay;
  bool decay_per_token;
};

constexpr int kQueries = 32;  // of a block of attention_kernel
constexpr int kAttentionThreads = 256;
constexpr int kParts = 4;              // of a tile's columns; warps: 2 groups of 16 queries times 4 parts
constexpr int kPart = kTile / kParts;  // 16 columns

// Shared memory of attention: rows of kD values, zeros behind head_dim.
template <typename T, int kD>
struct AttentionTile {
  static constexpr int kSize = Pack<T>::kSize;
  static constexpr int kRing = 3;
  static constexpr int kStride = kD + kSize;
  static constexpr int kLogitsStride = kTile + 4;
  static constexpr int kWeightsStride = kTile + kSize;
  static constexpr int kOutStride = kD + 4;
  static constexpr size_t kRowsBytes = sizeof(T) * (kQueries + kRing * kTile) * kStride;
  static constexpr size_t kLogitsBytes = sizeof(float) * kQueries * kLogitsStride;
  static constexpr size_t kBytes = kRowsBytes + kLogitsBytes + sizeof(T) * kQueries * kWeightsStride;
};

template <typename T, int kD>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(AttentionArguments<T> p) {
  using Tile = AttentionTile<T, kD>;
  constexpr int kSize = Tile::kSize;
  extern __shared__ __align__(128) unsigned char shared_attention[];
  __shared__ float2 extents[kParts][kQueries];  // of a part's columns: highest logit, sum of exp(logit - highest)
  __shared__ float4 rows[kQueries];             // highest logit, 1 / sum, what its probabilities count in the scores, -
  __shared__ float from_groups[2][kTile];
  T* queries = reinterpret_cast<T*>(shared_attention);
  T* ring = queries + kQueries * Tile::kStride;
  float* logits = reinterpret_cast<float*>(ring + Tile::kRing * kTile * Tile::kStride);
  T* weights = reinterpret_cast<T*>(logits + kQueries * Tile::kLogitsStride);

  const int head = blockIdx.x;
  const int kv_head = head / p.group;
  const int row_tile = gridDim.y - 1 - blockIdx.y;  // the longest first
  const int m0 = row_tile * kQueries;
  const int d = p.head_dim;
  const int lane = threadIdx.x % 32;
  const int group = threadIdx.x / 32 / kParts;
  const int part = threadIdx.x / 32 % kParts;
  const int length = *p.past_length;
  const int count = *p.num_tokens;
  const int past_tiles = ceil_div(length, kTile);
  const int tiles = past_tiles + ceil_div(m0 + kQueries, kTile);  // of the new columns, those that a query sees

  const auto load_rows = [&](T* to, const T* from, int wanted, int live) {
    constexpr int kPacks = kD / kSize;
    for (int i = threadIdx.x; i < wanted * kPacks; i += kAttentionThreads) {
      const int row = i / kPacks;
      const int k = i % kPacks * kSize;
      copy_async(to + row * Tile::kStride + k, from + static_cast<int64_t>(row) * d + k, row < live && k < d);
    }
  };
  // The tiles in the order of their use: keys, then keys and values taking turns.
  const auto load = [&](int item) {
    if (item < 3 * tiles) {
      const bool is_value = item >= tiles && (item - tiles) % 2 == 1;
      const int tile = item < tiles ? item : (item - tiles) / 2;
      T* to = ring + item % Tile::kRing * kTile * Tile::kStride;
      const bool past = tile < past_tiles;
      const int first = (past ? tile : tile - past_tiles) * kTile;
      const int64_t start = static_cast<int64_t>(kv_head) * (past ? p.capacity : p.width) + first;
      const T* from = past ? (is_value ? p.past_value : p.past_key) : (is_value ? p.new_value : p.new_key);
      load_rows(to, from + start * d, kTile, (past ? length : p.width) - first);
    }
    __pipeline_commit();
  };
  const auto next = [&](int item) {
    __pipeline_wait_prior(Tile::kRing - 2);
    __syncthreads();
    load(item + Tile::kRing - 1);
    return ring + item % Tile::kRing * kTile * Tile::kStride;
  };
  // How many columns of a warp's part of a tile query m0 + row sees: those before the end.
  const auto seen = [&](int tile, int row) {
    const int end = tile < past_tiles ? length - tile * kTile : m0 + row + 1 - (tile - past_tiles) * kTile;
    return end - kPart * part;
  };
  float* my_logits = logits + 16 * group * Tile::kLogitsStride + kPart * part;
  const auto make_logits = [&](const T* keys) {
    WarpProduct<T, 16, kPart, true> product;
    product.template add<kD>(queries + 16 * group * Tile::kStride, Tile::kStride, keys + kPart * part * Tile::kStride,
                             Tile::kStride);
    __syncwarp();
    product.store(my_logits, Tile::kLogitsStride);
    __syncwarp();
  };

  load_rows(queries, p.query + (static_cast<int64_t>(head) * p.width + m0) * d, kQueries, p.width - m0);
  load(0);
  load(1);

  // First look: two lanes a row, 8 columns each.
  const int my_row = 16 * group + lane / 2;
  float highest = -FLT_MAX;
  float sum = 0.0f;
  const auto join = [](float& top, float& total, float other_top, float other_total) {
    const float higher = fmaxf(top, other_top);
    total = total * exponential<T>(top - higher) + other_total * exponential<T>(other_top - higher);
    top = higher;
  };
  for (int tile = 0; tile < tiles; ++tile) {
    make_logits(next(tile));
    constexpr int kMine = kPart / 2;
    const int first = lane % 2 * kMine;
    const int end = seen(tile, my_row) - first;
    const float* from = my_logits + lane / 2 * Tile::kLogitsStride + first;
    float x[kMine];
    float top = -FLT_MAX;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {  // selected, not branched: exponentials side by side
      x[i] = i < end ? rounded<T>(from[i]) : -INFINITY;
      top = fmaxf(top, x[i]);
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kMine; ++i) total += exponential<T>(x[i] - top);
    join(highest, sum, top, total);
  }
  join(highest, sum, __shfl_xor_sync(0xffffffffu, highest, 1), __shfl_xor_sync(0xffffffffu, sum, 1));
  if (lane % 2 == 0) extents[part][my_row] = {highest, sum};
  __syncthreads();
  if (threadIdx.x < kQueries) {
    const int query = m0 + static_cast<int>(threadIdx.x);
    float2 extent = extents[0][threadIdx.x];
#pragma unroll
    for (int i = 1; i < kParts; ++i) join(extent.x, extent.y, extents[i][threadIdx.x].x, extents[i][threadIdx.x].y);
    const float age_weight = p.decay_per_token ? powf(p.score_decay, static_cast<float>(count - 1 - query)) : 1.0f;
    rows[threadIdx.x] = {extent.x, 1.0f / extent.y, query < count ? age_weight : 0.0f, 0.0f};
  }

  // Second look: two lanes a column, every other row each.
  const int my_column = lane % 16;
  WarpProduct<T, 16, kD, false> product;
  for (int tile = 0; tile < tiles; ++tile) {
    make_logits(next(tiles + 2 * tile));
    float collected = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = 2 * i + lane / 16;
      const float4 r = rows[16 * group + row];
      const bool sees = my_column < seen(tile, 16 * group + row);
      const float x = sees ? rounded<T>(my_logits[row * Tile::kLogitsStride + my_column]) : -INFINITY;
      const float share = exponential<T>(x - r.x) * r.y;
      collected = fmaf(r.z, share, collected);
      weights[(16 * group + row) * Tile::kWeightsStride + kPart * part + my_column] = from_float<T>(share);
    }
    collected += __shfl_xor_sync(0xffffffffu, collected, 16);
    if (lane < 16) from_groups[group][kPart * part + my_column] = collected;
    const T* values = next(tiles + 2 * tile + 1);
    if (threadIdx.x < kTile) {
      const bool past = tile < past_tiles;
      const int column = (past ? tile : tile - past_tiles) * kTile + static_cast<int>(threadIdx.x);
      if (column < (past ? p.capacity : p.width)) {
        const int64_t row = static_cast<int64_t>(head) * gridDim.y + row_tile;
        p.collected[row * (p.capacity + p.width) + (past ? column : p.capacity + column)] =
            from_groups[0][threadIdx.x] + from_groups[1][threadIdx.x];
      }
    }
    product.template add<kPart>(weights + 16 * group * Tile::kWeightsStride + kPart * part, Tile::kWeightsStride,
                                values + kPart * part * Tile::kStride, Tile::kStride);
  }
  __pipeline_wait_prior(0);
  float* out = reinterpret_cast<float*>(ring);
  float* mine = out + 16 * group * Tile::kOutStride;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    __syncthreads();
    if (part != i) continue;
    if (i == 0) {
      product.store(mine, Tile::kOutStride);
    } else {
      product.template store<true>(mine, Tile::kOutStride);
    }
  }
  __syncthreads();
  const int packs = d / kSize;
  for (int i = threadIdx.x; i < kQueries * packs; i += kAttentionThreads) {
    const int m = m0 + i / packs;
    const int n = i % packs * kSize;
    if (m >= p.width) break;
    Pack<T> y;
#pragma unroll
    for (int j = 0; j < kSize; ++j) y.set(j, out[i / packs * Tile::kOutStride + n + j]);
    y.store(p.out + (static_cast<int64_t>(m) * p.num_heads + head) * d + n);
  }
}

constexpr int kScoresColumns = 32;  // of a block of scores_kernel, whose warps share the summands
constexpr int kScoresWarps = 8;

// Scores: sums what the tiles of queries of its group of heads gave a column.
template <typename T>
__global__ void __launch_bounds__(kScoresColumns* kScoresWarps) scores_kernel(AttentionArguments<T> p) {
  __shared__ float partial[kScoresWarps][kScoresColumns];
  const int columns = p.capacity + p.width;
  const int column = blockIdx.x * kScoresColumns + threadIdx.x;
  const int kv_head = blockIdx.y;
  const int row_tiles = ceil_div(p.width, kQueries);
  const bool past = column < p.capacity;
  float sum = 0.0f;
  if (column < columns && (!past || column < *p.past_length)) {
    const int first = past ? 0 : (column - p.capacity) / kQueries;  // tile of queries that sees the column
    const float* from = p.collected + static_cast<int64_t>(kv_head) * p.group * row_tiles * columns + column;
#pragma unroll 4
    for (int i = threadIdx.y; i < p.group * row_tiles; i += kScoresWarps) {
      if (i % row_tiles >= first) sum += from[static_cast<int64_t>(i) * columns];
    }
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
#pragma unroll
  for (int i = 1; i < kScoresWarps; ++i) sum += partial[i][threadIdx.x];
  if (past && p.past_scores != nullptr) {
    const auto count = static_cast<float>(*p.num_tokens);
    const float decay = p.decay_per_token ? powf(p.score_decay, count) : p.score_decay;
    sum += decay * p.past_scores[static_cast<int64_t>(kv_head) * p.capacity + column];
  }
  p.scores[static_cast<int64_t>(kv_head) * columns + column] = sum;
}

template <typename T, int kD>
void attention_of(const AttentionArguments<T>& a, Launcher& launch) {
  const dim3 grid(a.num_heads, ceil_div(a.width, kQueries));
  launch(attention_kernel<T, kD>, grid, kAttentionThreads, AttentionTile<T, kD>::kBytes, a);
}

template <typename T>
void attention(const AttentionArguments<T>& a, Launcher& launch) {
  if (a.head_dim <= 64) {
    attention_of<T, 64>(a, launch);
  } else if (a.head_dim <= 128 || sizeof(T) == 4) {
    attention_of<T, 128>(a, launch);
  } else {
    attention_of<T, 256>(a, launch);
  }
  const dim3 grid(ceil_div(a.capacity + a.width, kScoresColumns), a.num_heads / a.group);
  launch(scores_kernel<T>, grid, dim3(kScoresColumns, kScoresWarps), 0, a);
}

template <typename T>
struct Scratch {
  T* normed;         // [w, hidden]
  T* qkv;            // [w, heads + 2h, d]
  T* query;          // [heads, w, d]
  float* collected;  // [heads, row tiles, s]
  T* attended;       // [w, heads, d]
  T* middle;         // [w, hidden]
  T* gated;          // [w, intermediate]
};

template <typename T>
Scratch<T> carve(const LayerShape& s, Carver& c) {
  const auto w = static_cast<size_t>(s.width);
  const size_t heads = w * s.num_heads;
  Scratch<T> r;
  r.normed = c.take<T>(w * s.hidden);
  r.qkv = c.take<T>((heads + 2 * w * s.num_kv_heads) * s.head_dim);
  r.query = c.take<T>(heads * s.head_dim);
  r.collected = c.take<float>(static_cast<size_t>(s.num_heads) * ceil_div(s.width, kQueries) * (s.capacity + s.width));
  r.attended = c.take<T>(heads * s.head_dim);
  r.middle = c.take<T>(w * s.hidden);
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
  const auto alone = [](const Linear& linear) { return Stack{{linear, {}, {}}, {0, INT_MAX, INT_MAX}}; };
  Launcher launch(stream);
  launch(rms_norm_kernel<T>, w, 128, 0, x, static_cast<const T*>(in.input_norm), r.normed, s.hidden, s.eps);
  const Stack qkv = {{in.q, in.k, in.v}, {0, q_size, q_size + kv_size}};
  linear<T>({r.normed, qkv, nullptr, r.qkv, nullptr, w, q_size + 2 * kv_size, s.hidden}, launch);
  const HeadsArguments<T> heads = {r.qkv,
                                   r.query,
                                   static_cast<T*>(out.key),
                                   static_cast<T*>(out.value),
                                   static_cast<const T*>(in.q_norm),
                                   static_cast<const T*>(in.k_norm),
                                   in.position,
                                   make_rope(s, in),
                                   w,
                                   s.num_heads,
                                   s.num_kv_heads,
                                   s.head_dim,
                                   s.eps,
                                   rounded_scale(s.dtype, s.head_dim)};
  launch(heads_kernel<T>, w, 256, 0, heads);
  const AttentionArguments<T> a = {r.query,
                                   static_cast<const T*>(in.past_key),
                                   static_cast<const T*>(in.past_value),
                                   static_cast<const T*>(out.key),
                                   static_cast<const T*>(out.value),
                                   r.attended,
                                   r.collected,
                                   out.scores,
                                   in.past_scores,
                                   in.past_length,
                                   in.num_tokens,
                                   w,
                                   s.num_heads,
                                   s.num_heads / s.num_kv_heads,
                                   s.head_dim,
                                   s.capacity,
                                   s.score_decay,
                                   s.decay_per_token};
  attention<T>(a, launch);
  linear<T>({r.attended, alone(in.o), x, r.middle, nullptr, w, s.hidden, q_size}, launch);
  launch(rms_norm_kernel<T>, w, 128, 0, r.middle, static_cast<const T*>(in.post_norm), r.normed, s.hidden, s.eps);
  gate_up<T>({r.normed, in.gate, in.up, r.gated, w, s.intermediate, s.hidden}, launch);
  linear<T>({r.gated, alone(in.down), r.middle, static_cast<T*>(out.x), nullptr, w, s.hidden, s.intermediate}, launch);
  return launch.code();
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
    const Stack all = {{{weight, nullptr}, {}, {}}, {0, INT_MAX, INT_MAX}};
    Launcher launch(stream);
    linear<T>({static_cast<const T*>(hidden_states), all, nullptr, nullptr, logits, width, vocab_size, hidden}, launch);
    return launch.code();
  });
}

}  // namespace lococo::trt
