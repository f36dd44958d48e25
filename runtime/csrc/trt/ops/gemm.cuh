// gemm.cuh - matrix products of a block of tokens: out[m][n] = sum over k of A[m][k] * B(k, n), tensor cores for 16-bit
// types, plain float for float32 (no TF32). Where B's rows lie and what becomes of a sum are functors, so that weights,
// cache columns and gathered slots need no copy.
#pragma once

#include <cuda_pipeline.h>
#include <mma.h>

#include <type_traits>

#include "trt/ops/common.cuh"

namespace lococo::trt {

namespace wmma = nvcuda::wmma;

constexpr int kTile = 64;  // columns of a tile
constexpr int kGemmThreads = 128;

// 16 bytes to shared memory, zeros if !valid: then `from` is not read.
template <typename T>
__device__ __forceinline__ void copy_async(T* to, const T* from, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(valid ? 16 : 0)
      : "memory");
}

// A warp's sums [kM, kN] of products of tiles in shared memory: A [kM, lda] row-major; B [kN, ldb] with k contiguous if
// kTransposed, else [k, ldb].
template <typename T, int kM, int kN, bool kTransposed>
class WarpProduct {
 public:
  __device__ __forceinline__ WarpProduct() {
    for (auto& row : sums_) {
      for (auto& sum : row) wmma::fill_fragment(sum, 0.0f);
    }
  }

  template <int kDepth>
  __device__ __forceinline__ void add(const T* a, int lda, const T* b, int ldb) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> af[kM / 16];
#pragma unroll
      for (int i = 0; i < kM / 16; ++i) wmma::load_matrix_sync(af[i], a + 16 * i * lda + k, lda);
#pragma unroll
      for (int j = 0; j < kN / 16; ++j) {
        using Layout = std::conditional_t<kTransposed, wmma::col_major, wmma::row_major>;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, Layout> bf;
        wmma::load_matrix_sync(bf, kTransposed ? b + 16 * j * ldb + k : b + k * ldb + 16 * j, ldb);
#pragma unroll
        for (int i = 0; i < kM / 16; ++i) wmma::mma_sync(sums_[i][j], af[i], bf, sums_[i][j]);
      }
    }
  }

  // to [kM, ld]: the sums, on top of what is there if kOnTop.
  template <bool kOnTop = false>
  __device__ __forceinline__ void store(float* to, int ld) {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kN / 16; ++j) {
        float* at = to + 16 * i * ld + 16 * j;
        if constexpr (kOnTop) {
          Sums below;
          wmma::load_matrix_sync(below, at, ld, wmma::mem_row_major);
          for (int e = 0; e < sums_[i][j].num_elements; ++e) sums_[i][j].x[e] += below.x[e];
        }
        wmma::store_matrix_sync(at, sums_[i][j], ld, wmma::mem_row_major);
      }
    }
  }

 private:
  using Sums = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;
  Sums sums_[kM / 16][kN / 16];
};

template <int kM, int kN, bool kTransposed>
class WarpProduct<float, kM, kN, kTransposed> {  // lane: rows lane / 4 + 8 i, columns lane % 4 + 4 j
 public:
  template <int kDepth>
  __device__ __forceinline__ void add(const float* a, int lda, const float* b, int ldb) {
    const int row = threadIdx.x % 32 / 4;
    const int column = threadIdx.x % 4;
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int j = 0; j < kN / 4; ++j) {
        const float y = kTransposed ? b[(column + 4 * j) * ldb + k] : b[k * ldb + column + 4 * j];
#pragma unroll
        for (int i = 0; i < kM / 8; ++i) sums_[i][j] = fmaf(a[(row + 8 * i) * lda + k], y, sums_[i][j]);
      }
    }
  }

  template <bool kOnTop = false>
  __device__ __forceinline__ void store(float* to, int ld) {
    float* at = to + threadIdx.x % 32 / 4 * ld + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kM / 8; ++i) {
#pragma unroll
      for (int j = 0; j < kN / 4; ++j) {
        float& cell = at[8 * i * ld + 4 * j];
        cell = kOnTop ? cell + sums_[i][j] : sums_[i][j];
      }
    }
  }

 private:
  float sums_[kM / 8][kN / 4] = {};
};

template <typename T, int kRows>
struct GemmTile {
  static constexpr int kSize = Pack<T>::kSize;
  static constexpr int kDepth = 128 / sizeof(T);      // of k: rows of 128 bytes
  static constexpr int kPacks = kDepth / kSize;       // 8
  static constexpr int kRowsStride = kDepth + kSize;  // [rows][depth], padded against bank conflicts
  static constexpr int kColsStride = kTile + kSize;   // [depth][64]
  static constexpr int kOutStride = kTile + 4;
  static constexpr int kStages = kRows > kTile ? 3 : 4;
  static constexpr int kA = kRows * kRowsStride;
  static constexpr int kB = kTile * kRowsStride > kDepth* kColsStride ? kTile* kRowsStride : kDepth* kColsStride;
  static constexpr size_t kInBytes = sizeof(T) * kStages * (kA + kB);
  static constexpr size_t kOutBytes = sizeof(float) * kRows * kOutStride;
  static constexpr size_t kBytes = kInBytes > kOutBytes ? kInBytes : kOutBytes;
};

// A tile of kRows (32, 64 or 128) by 64 a block. A row-major, k contiguous: row m < M begins at a(m). B either
// kTransposed, rows of n with k contiguous, row n < N beginning at b(n, 0); or rows of k with n contiguous: b(k, n) is
// a pointer to 16 bytes. K and, for rows of k, N are multiples of Pack<T>::kSize. epilogue(m, n, sums) is called for
// every m < M and every n < N that is a multiple of Pack<T>::kSize, within the tile's first kOut columns, with the sums
// from n on: floats in shared memory, as many as the tile has. Dynamic shared memory: GemmTile<T, kRows>::kBytes.
template <typename T, bool kTransposed, int kRows, int kOut, typename A, typename B, typename Epilogue>
__device__ void gemm_tile(int M, int N, int K, int m0, int n0, A&& a, B&& b, Epilogue&& epilogue) {
  extern __shared__ __align__(128) unsigned char shared_gemm[];
  using Tile = GemmTile<T, kRows>;
  constexpr int kSize = Tile::kSize;
  constexpr int kStages = Tile::kStages;
  constexpr int kACopies = kRows * Tile::kPacks / kGemmThreads;  // of a thread
  constexpr int kBCopies = kTile * Tile::kPacks / kGemmThreads;
  constexpr int kRowStep = kGemmThreads / Tile::kPacks;
  T* a_tiles = reinterpret_cast<T*>(shared_gemm);
  T* b_tiles = a_tiles + kStages * Tile::kA;
  const int steps = ceil_div(K, Tile::kDepth);

  const int row = threadIdx.x / Tile::kPacks;  // and every kRowStep-th after it
  const int k = threadIdx.x % Tile::kPacks * kSize;
  const T* a_rows[kACopies];
  const T* b_rows[kBCopies];
#pragma unroll
  for (int u = 0; u < kACopies; ++u) a_rows[u] = a(min(m0 + row + u * kRowStep, M - 1)) + k;
  if constexpr (kTransposed) {
#pragma unroll
    for (int u = 0; u < kBCopies; ++u) b_rows[u] = b(min(n0 + row + u * kRowStep, N - 1), 0) + k;
  }
  const auto load = [&](int step) {
    if (step < steps) {
      const int k0 = step * Tile::kDepth;
      const bool in_depth = k0 + k < K;
      T* at = a_tiles + step % kStages * Tile::kA + row * Tile::kRowsStride + k;
      T* bt = b_tiles + step % kStages * Tile::kB;
#pragma unroll
      for (int u = 0; u < kACopies; ++u) {
        copy_async(at + u * kRowStep * Tile::kRowsStride, a_rows[u] + k0, in_depth && m0 + row + u * kRowStep < M);
      }
#pragma unroll
      for (int u = 0; u < kBCopies; ++u) {
        if constexpr (kTransposed) {
          copy_async(bt + (row + u * kRowStep) * Tile::kRowsStride + k, b_rows[u] + k0,
                     in_depth && n0 + row + u * kRowStep < N);
        } else {
          constexpr int kColPacks = kTile / kSize;
          const int i = threadIdx.x + u * kGemmThreads;
          const int depth = i / kColPacks;
          const int n = i % kColPacks * kSize;
          const bool valid = k0 + depth < K && n0 + n < N;
          copy_async(bt + depth * Tile::kColsStride + n, valid ? b(k0 + depth, n0 + n) : nullptr, valid);
        }
      }
    }
    __pipeline_commit();
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);
  const int warp = threadIdx.x / 32;  // 2 x 2 of them
  const int wm = warp / 2 * (kRows / 2);
  const int wn = warp % 2 * (kTile / 2);
  WarpProduct<T, kRows / 2, kTile / 2, kTransposed> product;
  for (int step = 0; step < steps; ++step) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();
    load(step + kStages - 1);
    const T* at = a_tiles + step % kStages * Tile::kA + wm * Tile::kRowsStride;
    const T* bt = b_tiles + step % kStages * Tile::kB;
    if constexpr (kTransposed) {
      product.template add<Tile::kDepth>(at, Tile::kRowsStride, bt + wn * Tile::kRowsStride, Tile::kRowsStride);
    } else {
      product.template add<Tile::kDepth>(at, Tile::kRowsStride, bt + wn, Tile::kColsStride);
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  float* out = reinterpret_cast<float*>(shared_gemm);
  product.store(out + wm * Tile::kOutStride + wn, Tile::kOutStride);
  __syncthreads();
  constexpr int kOutPacks = kOut / kSize;
#pragma unroll
  for (int u = 0; u < kRows * kOutPacks / kGemmThreads; ++u) {
    const int i = threadIdx.x + u * kGemmThreads;
    const int m = i / kOutPacks;
    const int n = i % kOutPacks * kSize;
    if (m0 + m < M && n0 + n < N) epilogue(m0 + m, n0 + n, out + m * Tile::kOutStride + n);
  }
}

}  // namespace lococo::trt
