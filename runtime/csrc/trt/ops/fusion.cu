// Fusion: live columns to M slots (arXiv 2406.05317). All layers and heads of a launch work side by side: five kernels
// or so for up to 16 layers. Columns are named by where they lie: i for the cache's, c + j for new ones.
#include <algorithm>
#include <cfloat>
#include <string>

#include "error.h"
#include "trt/ops/gemm.cuh"

namespace lococo::trt {
namespace {

constexpr int kSelectThreads = 512;
constexpr int kConvThreads = 256;
constexpr int kConvRows = 64;      // outputs of a tile
constexpr int kConvColumns = 128;  // positions of a tile
constexpr int kConvDepth = 16;     // channels at a time
constexpr int kConvOutStride = kConvColumns + 4;

struct Arguments {
  FusionLayer layers[kMaxFusionLayers];
  const int32_t* past_length;  // NULL: capacity
  const int32_t* num_tokens;   // NULL: 1
  int32_t* kept;               // [layers, h, keep] columns, in cache order
  int32_t* rest;               // [layers, h, most]
  int32_t* anchors;            // [layers, h, mixed], indices into rest
  int heads, width, head_dim, capacity, columns, keep, mixed, local;
  int most;    // columns - keep: the longest rest
  int stride;  // most, rounded up to 8

  [[nodiscard]] __device__ int length() const { return past_length == nullptr ? capacity : *past_length; }
  [[nodiscard]] __device__ int live() const { return length() + (num_tokens == nullptr ? 1 : *num_tokens); }
  [[nodiscard]] __device__ int rest_length() const { return live() - keep; }
};

// blockIdx of kernels that run for every layer and head.
struct Place {
  int index, layer, head;
};
__device__ __forceinline__ Place place(const Arguments& a, int index) {
  return {index, index / a.heads, index % a.heads};
}

// A row of d values of a column.
template <typename T>
__device__ __forceinline__ const T* row_of(const Arguments& a, const Place& p, int column, bool is_value) {
  const FusionLayer& layer = a.layers[p.layer];
  const bool past = column < a.capacity;
  const void* base = is_value ? (past ? layer.past_value : layer.new_value) : (past ? layer.past_key : layer.new_key);
  const int64_t row = past ? static_cast<int64_t>(p.head) * a.capacity + column
                           : static_cast<int64_t>(p.head) * a.width + column - a.capacity;
  return static_cast<const T*>(base) + row * a.head_dim;
}

// Which columns stay, which are the rest, and which of the rest are anchors: one sort by score, falling, ties by age.
__global__ void __launch_bounds__(kSelectThreads) select_kernel(Arguments a, int padded) {
  extern __shared__ unsigned long long keys[];  // [padded], a power of two; then a byte for each
  auto* role = reinterpret_cast<uint8_t*>(keys + padded);
  __shared__ int totals[kSelectThreads];
  const Place p = place(a, blockIdx.x);
  const int length = a.length();
  const int live = a.live();
  const int candidates = live - a.local;
  const float* scores = a.layers[p.layer].scores + static_cast<int64_t>(p.head) * a.columns;
  const auto column_of = [&](int rank) { return rank < length ? rank : a.capacity + rank - length; };
  for (int rank = threadIdx.x; rank < padded; rank += kSelectThreads) {
    unsigned long long key = ~0ull;
    if (rank < candidates) {  // scores are never negative: their bits order as they do
      key = static_cast<unsigned long long>(~__float_as_uint(scores[column_of(rank)])) << 32 |
            static_cast<unsigned>(rank);
    }
    keys[rank] = key;
    role[rank] = rank >= candidates && rank < live ? 1 : 0;
  }
  for (int size = 2; size <= padded; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < padded / 2; i += kSelectThreads) {
        const int low = i / step * 2 * step + i % step;
        const bool ascending = (low & size) == 0;
        const unsigned long long x = keys[low];
        const unsigned long long y = keys[low + step];
        if ((x > y) == ascending) {
          keys[low] = y;
          keys[low + step] = x;
        }
      }
    }
  }
  __syncthreads();
  const int heavy = a.keep - a.local;
  for (int i = threadIdx.x; i < heavy + a.mixed; i += kSelectThreads) {
    role[static_cast<unsigned>(keys[i])] = i < heavy ? 1 : 2;
  }
  __syncthreads();
  // In cache order again: every thread a stretch of ranks. A count of kept ones below, of anchors above 16 bits.
  const int each = ceil_div(live, kSelectThreads);
  const int begin = min(live, static_cast<int>(threadIdx.x) * each);
  const int end = min(live, begin + each);
  int count = 0;
  for (int rank = begin; rank < end; ++rank) count += role[rank] == 1 ? 1 : role[rank] == 2 ? 1 << 16 : 0;
  totals[threadIdx.x] = count;
  __syncthreads();
  for (int offset = 1; offset < kSelectThreads; offset *= 2) {
    const int before = threadIdx.x >= offset ? totals[threadIdx.x - offset] : 0;
    __syncthreads();
    totals[threadIdx.x] += before;
    __syncthreads();
  }
  const int before = totals[threadIdx.x] - count;
  int kept = before & 0xffff;
  int anchors = before >> 16;
  for (int rank = begin; rank < end; ++rank) {
    if (role[rank] == 1) {
      a.kept[p.index * a.keep + kept++] = column_of(rank);
      continue;
    }
    const int position = rank - kept;
    if (a.rest != nullptr) a.rest[static_cast<int64_t>(p.index) * a.most + position] = column_of(rank);
    if (role[rank] == 2) a.anchors[p.index * a.mixed + anchors++] = position;
  }
}

template <typename T>
__device__ __forceinline__ float activate(Activation kind, float x) {
  switch (kind) {
    case Activation::kRelu:
      return fmaxf(x, 0.0f);
    case Activation::kSilu:
      return silu<T>(x);
    case Activation::kTanh:
      return rounded<T>(tanhf(x));
    case Activation::kGelu: {
      const float erf = rounded<T>(erff(rounded<T>(x * rounded<T>(0.70710678118654752f))));
      return rounded<T>(rounded<T>(x * 0.5f) * rounded<T>(erf + 1.0f));
    }
    default:
      return x;
  }
}

// One convolution over the rest. Input: the rest's rows, keys then values, or what the convolution before wrote.
template <typename T>
struct ConvArguments {
  const T* in;  // [layers * h, stride, in_channels], or NULL for the rest
  T* by_tap;    // [layers][in_channels / 16][taps][out_channels][16]: the weights, laid out for conv_tile_kernel
  T* out;       // [layers * h, stride, out_channels]; the last one writes [layers * h, out_channels, stride]
  int index;    // of the convolution
  int in_channels, out_channels, kernel_size;
  Activation activation;
  bool last;
};

template <typename T>
__device__ __forceinline__ const T* conv_input(const Arguments& a, const ConvArguments<T>& c, const Place& p, int n,
                                               int channel) {
  if (c.in != nullptr) return c.in + (static_cast<int64_t>(p.index) * a.stride + n) * c.in_channels + channel;
  const int column = a.rest[static_cast<int64_t>(p.index) * a.most + n];
  const bool is_value = channel >= a.head_dim;
  return row_of<T>(a, p, column, is_value) + (is_value ? channel - a.head_dim : channel);
}

template <typename T>
__device__ __forceinline__ void conv_output(const Arguments& a, const ConvArguments<T>& c, const Place& p, int o, int n,
                                            float sum) {
  const auto* bias = static_cast<const T*>(a.layers[p.layer].bias[c.index]);
  const T y = from_float<T>(activate<T>(c.activation, rounded<T>(sum + to_float(bias[o]))));
  const int64_t first = static_cast<int64_t>(p.index) * a.stride * c.out_channels;
  c.out[first + (c.last ? static_cast<int64_t>(o) * a.stride + n : static_cast<int64_t>(n) * c.out_channels + o)] = y;
}

// Any shape and type, and taps that no shared memory holds: a thread an output.
template <typename T>
__global__ void conv_kernel(Arguments a, ConvArguments<T> c) {
  const Place p = place(a, blockIdx.z);
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  const int length = a.rest_length();
  if (n >= length) return;
  const int o = blockIdx.y;
  const int half = c.kernel_size / 2;
  const T* weight = static_cast<const T*>(a.layers[p.layer].weight[c.index]) +
                    static_cast<int64_t>(o) * c.in_channels * c.kernel_size;
  float sum = 0.0f;
  for (int tap = max(0, half - n); tap < min(c.kernel_size, length + half - n); ++tap) {
    for (int channel = 0; channel < c.in_channels; ++channel) {
      sum = fmaf(to_float(weight[channel * c.kernel_size + tap]),
                 to_float(*conv_input(a, c, p, n + tap - half, channel)), sum);
    }
  }
  conv_output(a, c, p, o, n, sum);
}

// Weights [out, in, taps] to by_tap: a block a layer and output.
template <typename T>
__global__ void by_tap_kernel(Arguments a, ConvArguments<T> c) {
  const int o = blockIdx.x;
  const int size = c.in_channels * c.kernel_size;
  const T* from = static_cast<const T*>(a.layers[blockIdx.y].weight[c.index]) + static_cast<int64_t>(o) * size;
  T* to = c.by_tap + static_cast<int64_t>(blockIdx.y) * c.out_channels * size;
  extern __shared__ __align__(16) unsigned char shared_weights[];
  T* row = reinterpret_cast<T*>(shared_weights);
  constexpr int kSize = Pack<T>::kSize;  // divides size: in_channels is a multiple of 16
  for (int i = threadIdx.x; i < size / kSize; i += blockDim.x) Pack<T>::stream(from + i * kSize).store(row + i * kSize);
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const int k = i % kConvDepth;
    const int tap = i / kConvDepth % c.kernel_size;
    const int chunk = i / kConvDepth / c.kernel_size;
    to[((static_cast<int64_t>(chunk) * c.kernel_size + tap) * c.out_channels + o) * kConvDepth + k] =
        row[(chunk * kConvDepth + k) * c.kernel_size + tap];
  }
}

// 16-bit types: tensor cores, 64 outputs by 128 positions a block. For 16 channels at a time the weights of all taps
// are laid out in shared memory, and a tap is the same input, one row further.
template <typename T>
__global__ void __launch_bounds__(kConvThreads) conv_tile_kernel(Arguments a, ConvArguments<T> c) {
  namespace wmma = nvcuda::wmma;
  constexpr int kSize = Pack<T>::kSize;
  extern __shared__ __align__(128) unsigned char shared_conv[];
  const int taps = c.kernel_size;
  T* weights = reinterpret_cast<T*>(shared_conv);       // [taps][64][16]
  T* inputs = weights + taps * kConvRows * kConvDepth;  // [128 + taps - 1][16]
  const Place p = place(a, blockIdx.z);
  const int length = a.rest_length();
  const int n0 = blockIdx.x * kConvColumns;
  const int o0 = blockIdx.y * kConvRows;
  if (n0 >= length) return;
  const int wm = threadIdx.x / 32 / 4 * 32;
  const int wn = threadIdx.x / 32 % 4 * 32;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[2][2];
  for (auto& row : sums) {
    for (auto& sum : row) wmma::fill_fragment(sum, 0.0f);
  }
  const T* by_tap = c.by_tap + static_cast<int64_t>(p.layer) * c.out_channels * c.in_channels * taps;
  for (int channel = 0; channel < c.in_channels; channel += kConvDepth) {
    __syncthreads();
    constexpr int kRowPacks = kConvDepth / kSize;
    const T* chunk = by_tap + static_cast<int64_t>(channel) * taps * c.out_channels;  // [taps][out_channels][16]
    for (int i = threadIdx.x; i < taps * kConvRows * kRowPacks; i += kConvThreads) {
      const int k = i % kRowPacks * kSize;
      const int row = i / kRowPacks % kConvRows;
      const int tap = i / kRowPacks / kConvRows;
      copy_async(weights + (tap * kConvRows + row) * kConvDepth + k,
                 chunk + (static_cast<int64_t>(tap) * c.out_channels + o0 + row) * kConvDepth + k,
                 o0 + row < c.out_channels);
    }
    for (int i = threadIdx.x; i < (kConvColumns + taps - 1) * kRowPacks; i += kConvThreads) {
      const int row = i / kRowPacks;
      const int k = i % kRowPacks * kSize;
      const int n = n0 + row - taps / 2;
      const bool live = n >= 0 && n < length;
      copy_async(inputs + row * kConvDepth + k, live ? conv_input(a, c, p, n, channel + k) : nullptr, live);
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    for (int tap = 0; tap < taps; ++tap) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> af[2];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> bf[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        wmma::load_matrix_sync(af[i], weights + (tap * kConvRows + wm + 16 * i) * kConvDepth, kConvDepth);
        wmma::load_matrix_sync(bf[i], inputs + (wn + 16 * i + tap) * kConvDepth, kConvDepth);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) wmma::mma_sync(sums[i][j], af[i], bf[j], sums[i][j]);
      }
    }
  }
  __syncthreads();
  float* out = reinterpret_cast<float*>(shared_conv);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      wmma::store_matrix_sync(out + (wm + 16 * i) * kConvOutStride + wn + 16 * j, sums[i][j], kConvOutStride,
                              wmma::mem_row_major);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kConvRows * kConvColumns; i += kConvThreads) {
    const int o = i / kConvColumns;
    const int n = i % kConvColumns;
    if (o0 + o < c.out_channels && n0 + n < length) {
      conv_output(a, c, p, o0 + o, n0 + n, out[o * kConvOutStride + n]);
    }
  }
}

size_t conv_tile_bytes(int taps) {
  const size_t in =
      2 * static_cast<size_t>(kConvDepth) * (static_cast<size_t>(taps) * kConvRows + kConvColumns + taps - 1);
  const size_t out = sizeof(float) * kConvRows * kConvOutStride;
  return in > out ? in : out;
}

// In place, a warp a row of z [layers * h, mixed, stride]; zeros behind the rest.
template <typename T>
__global__ void mix_softmax_kernel(Arguments a, T* z, int rows) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const int length = a.rest_length();
  T* x = z + static_cast<int64_t>(row) * a.stride;
  float highest = -FLT_MAX;
  for (int i = lane; i < length; i += 32) highest = fmaxf(highest, to_float(x[i]));
  highest = warp_max(highest);
  float sum = 0.0f;
  for (int i = lane; i < length; i += 32) sum += expf(to_float(x[i]) - highest);
  sum = warp_sum(sum);
  for (int i = lane; i < a.stride; i += 32) {
    x[i] = from_float<T>(i < length ? expf(to_float(x[i]) - highest) / sum : 0.0f);
  }
}

template <typename T>
struct MixArguments {
  Arguments a;
  const T* mix;  // [layers * h, mixed, stride]
};

// Mixed slots: (1 - normalizer) * anchor + normalizer * sum over the rest.
template <typename T>
__global__ void __launch_bounds__(kGemmThreads) mix_kernel(MixArguments<T> m_args) {
  const Arguments& a = m_args.a;
  const T* mix = m_args.mix;
  const Place p = place(a, blockIdx.z);
  const FusionLayer& layer = a.layers[p.layer];
  const int length = a.rest_length();
  const int d = a.head_dim;
  const int32_t* rest = a.rest + static_cast<int64_t>(p.index) * a.most;
  const float normalizer = to_float(*static_cast<const T*>(layer.normalizer));
  const float share = rounded<T>(1.0f - normalizer);
  const auto at = [&](int position, int n) { return row_of<T>(a, p, rest[position], n >= d) + (n >= d ? n - d : n); };
  gemm_tile<T, false, 64, kTile>(
      a.mixed, 2 * d, ceil_div(length, Pack<T>::kSize) * Pack<T>::kSize, blockIdx.y * 64, blockIdx.x * kTile,
      [&](int m) { return mix + (static_cast<int64_t>(p.index) * a.mixed + m) * a.stride; },
      [&](int k, int n) { return at(min(k, length - 1), n); },
      [&](int m, int n, const float* sums) {
        const Pack<T> anchor = Pack<T>::load(at(a.anchors[p.index * a.mixed + m], n));
        Pack<T> fused;
#pragma unroll
        for (int j = 0; j < Pack<T>::kSize; ++j) {
          fused.set(j, rounded<T>(anchor.get(j) * share) + rounded<T>(rounded<T>(sums[j]) * normalizer));
        }
        T* to = static_cast<T*>(n >= d ? layer.value : layer.key);
        fused.store(to + (static_cast<int64_t>(p.head) * a.capacity + a.keep + m) * d + (n >= d ? n - d : n));
      });
}

// Scores of the mixed slots: one warp each.
template <typename T>
__global__ void mix_scores_kernel(Arguments a, const T* mix) {
  const Place p = place(a, blockIdx.y);
  const int m = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (m >= a.mixed) return;
  const FusionLayer& layer = a.layers[p.layer];
  const int length = a.rest_length();
  const int32_t* rest = a.rest + static_cast<int64_t>(p.index) * a.most;
  const float* scores = layer.scores + static_cast<int64_t>(p.head) * a.columns;
  const T* row = mix + (static_cast<int64_t>(p.index) * a.mixed + m) * a.stride;
  float sum = 0.0f;
  for (int i = threadIdx.x % 32; i < length; i += 32) sum = fmaf(to_float(row[i]), scores[rest[i]], sum);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 != 0) return;
  const float normalizer = to_float(*static_cast<const T*>(layer.normalizer));
  const float share = rounded<T>(1.0f - normalizer);
  const float anchor = scores[rest[a.anchors[p.index * a.mixed + m]]];
  layer.out_scores[static_cast<int64_t>(p.head) * a.capacity + a.keep + m] = anchor * share + sum * normalizer;
}

// Kept slots as they are, and zeros behind the last slot.
template <typename T>
__global__ void keep_kernel(Arguments a, bool with_scores) {
  constexpr int kSize = Pack<T>::kSize;
  const Place p = place(a, blockIdx.y);
  const FusionLayer& layer = a.layers[p.layer];
  const int packs = a.head_dim / kSize;
  const int slots = a.keep + a.mixed;
  const int copied = a.capacity - a.mixed;  // kept slots and the zeros
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < copied * packs; i += gridDim.x * blockDim.x) {
    const int item = i / packs;
    const int slot = item < a.keep ? item : item + a.mixed;
    const int offset = i % packs * kSize;
    Pack<T> key{};
    Pack<T> value{};
    const int column = slot < slots ? a.kept[p.index * a.keep + slot] : -1;
    if (column >= 0) {
      key = Pack<T>::load(row_of<T>(a, p, column, false) + offset);
      value = Pack<T>::load(row_of<T>(a, p, column, true) + offset);
    }
    const int64_t to = (static_cast<int64_t>(p.head) * a.capacity + slot) * a.head_dim + offset;
    key.store(static_cast<T*>(layer.key) + to);
    value.store(static_cast<T*>(layer.value) + to);
    if (with_scores && offset == 0) {
      layer.out_scores[static_cast<int64_t>(p.head) * a.capacity + slot] =
          column >= 0 ? layer.scores[static_cast<int64_t>(p.head) * a.columns + column] : 0.0f;
    }
  }
}

template <typename T>
struct Scratch {
  int32_t* kept;
  int32_t* rest;
  int32_t* anchors;
  T* conv[2];  // outputs of the convolutions, taking turns
  T* by_tap;
};

int columns_of(const FusionShape& s) { return s.capacity + s.width; }
int stride_of(const FusionShape& s) { return ceil_div(columns_of(s) - s.keep, 8) * 8; }

template <typename T>
Scratch<T> carve(const FusionShape& s, Carver& c) {
  const size_t places = static_cast<size_t>(s.num_layers) * s.num_kv_heads;
  Scratch<T> r{};
  r.kept = c.take<int32_t>(places * s.keep);
  if (s.mixed == 0) return r;
  r.rest = c.take<int32_t>(places * (columns_of(s) - s.keep));
  r.anchors = c.take<int32_t>(places * s.mixed);
  int widest = 0;
  for (int i = 0; i < s.num_conv; ++i) widest = s.conv_out[i] > widest ? s.conv_out[i] : widest;
  const size_t count = places * stride_of(s) * widest;
  r.conv[0] = c.take<T>(count);
  if (s.num_conv > 1) r.conv[1] = c.take<T>(count);
  size_t largest = 0;
  size_t in_channels = 2 * static_cast<size_t>(s.head_dim);
  for (int i = 0; i < s.num_conv; ++i) {
    const size_t size = in_channels * s.conv_out[i] * s.kernel_size;
    largest = size > largest ? size : largest;
    in_channels = s.conv_out[i];
  }
  r.by_tap = c.take<T>(sizeof(T) == 2 ? largest * s.num_layers : 0);
  return r;
}

size_t conv_row_bytes(int in_channels, int taps) { return 2 * static_cast<size_t>(in_channels) * taps; }

// Why a convolution of a 16-bit type cannot run on tensor cores; "" if it can.
std::string untiled(const FusionShape& s, int in_channels, const Launcher& launch) {
  if (in_channels % kConvDepth != 0 || s.head_dim % kConvDepth != 0) {
    return format("%d channels of heads of %d are no multiples of %d", in_channels, s.head_dim, kConvDepth);
  }
  const size_t shared = std::max(conv_row_bytes(in_channels, s.kernel_size), conv_tile_bytes(s.kernel_size));
  if (shared <= launch.most_shared()) return "";
  return format("%d taps of %d channels take %zu bytes of shared memory, a block has %zu", s.kernel_size, in_channels,
                shared, launch.most_shared());
}

template <typename T>
void convolve(const FusionShape& s, const Arguments& a, const ConvArguments<T>& c, Launcher& launch) {
  const int places = s.num_layers * s.num_kv_heads;
  if constexpr (sizeof(T) == 2) {
    if (untiled(s, c.in_channels, launch).empty()) {
      const size_t row_bytes = conv_row_bytes(c.in_channels, c.kernel_size);
      const size_t tile_bytes = conv_tile_bytes(c.kernel_size);
      launch(by_tap_kernel<T>, dim3(c.out_channels, s.num_layers), 256, row_bytes, a, c);
      const dim3 grid(ceil_div(a.most, kConvColumns), ceil_div(c.out_channels, kConvRows), places);
      launch(conv_tile_kernel<T>, grid, kConvThreads, tile_bytes, a, c);
      return;
    }
  }
  launch(conv_kernel<T>, dim3(ceil_div(a.most, 128), c.out_channels, places), 128, 0, a, c);
}

template <typename T>
cudaError_t fuse(const FusionShape& s, const FusionLayer* layers, const int32_t* past_length, const int32_t* num_tokens,
                 void* workspace, cudaStream_t stream) {
  Carver carver(workspace);
  const Scratch<T> r = carve<T>(s, carver);
  Arguments a{};
  for (int i = 0; i < s.num_layers; ++i) a.layers[i] = layers[i];
  a.past_length = past_length;
  a.num_tokens = num_tokens;
  a.kept = r.kept;
  a.rest = r.rest;
  a.anchors = r.anchors;
  a.heads = s.num_kv_heads;
  a.width = s.width;
  a.head_dim = s.head_dim;
  a.capacity = s.capacity;
  a.columns = columns_of(s);
  a.keep = s.keep;
  a.mixed = s.mixed;
  a.local = s.local_len;
  a.most = a.columns - s.keep;
  a.stride = stride_of(s);
  const int places = s.num_layers * s.num_kv_heads;

  int padded = 2;
  while (padded < a.columns) padded *= 2;
  const size_t select_bytes = static_cast<size_t>(padded) * (sizeof(unsigned long long) + 1);
  Launcher launch(stream);
  launch(select_kernel, places, kSelectThreads, select_bytes, a, padded);
  launch(keep_kernel<T>, dim3(8, places), 256, 0, a, s.scores);
  if (s.mixed == 0) return launch.code();

  const T* in = nullptr;
  int in_channels = 2 * s.head_dim;
  for (int i = 0; i < s.num_conv; ++i) {
    const ConvArguments<T> c = {
        in, r.by_tap, r.conv[i % 2], i, in_channels, s.conv_out[i], s.kernel_size, s.activation, i + 1 == s.num_conv};
    convolve(s, a, c, launch);
    in = c.out;
    in_channels = c.out_channels;
  }
  T* mix = r.conv[(s.num_conv - 1) % 2];
  const int rows = places * s.mixed;
  launch(mix_softmax_kernel<T>, ceil_div(rows, 4), 128, 0, a, mix, rows);
  const dim3 grid(ceil_div(2 * s.head_dim, kTile), ceil_div(s.mixed, 64), places);
  launch(mix_kernel<T>, grid, kGemmThreads, GemmTile<T, 64>::kBytes, MixArguments<T>{a, mix});
  if (s.scores) launch(mix_scores_kernel<T>, dim3(ceil_div(s.mixed, 4), places), 128, 0, a, mix);
  return launch.code();
}

}  // namespace

size_t fusion_workspace(const FusionShape& shape) {
  return with_dtype(shape.dtype, [&](auto zero) {
    Carver carver(nullptr);
    (void)carve<decltype(zero)>(shape, carver);
    return carver.used();
  });
}

std::string slow_convolution(const FusionShape& shape) {
  if (shape.dtype == OpDtype::kFloat32 || shape.mixed == 0) return "";
  const Launcher launch(nullptr);
  int in_channels = 2 * shape.head_dim;
  for (int i = 0; i < shape.num_conv && launch.code() == cudaSuccess; ++i) {
    const std::string reason = untiled(shape, in_channels, launch);
    if (!reason.empty()) return format("convolution %d runs without tensor cores: %s", i, reason.c_str());
    in_channels = shape.conv_out[i];
  }
  return "";
}

cudaError_t run_fusion(const FusionShape& shape, const FusionLayer* layers, const int32_t* past_length,
                       const int32_t* num_tokens, void* workspace, cudaStream_t stream) {
  return with_dtype(shape.dtype, [&](auto zero) {
    return fuse<decltype(zero)>(shape, layers, past_length, num_tokens, workspace, stream);
  });
}

}  // namespace lococo::trt
