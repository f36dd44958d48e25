// gemm.cuh - matrix products of a block of tokens: out[m][n] = sum over k of A[m][k] * B(k, n), a tile of 64 x 64 a
// block, tensor cores for 16-bit types, plain float for float32 (no TF32). Where B's rows lie and what becomes of a sum
// are functors, so that weights, cache columns and gathered slots need no copy.
#pragma once

#include <cuda_pipeline.h>
#include <mma.h>

#include <climits>

#include "trt/ops/common.cuh"

namespace lococo::trt {

constexpr int kTile = 64;
constexpr int kGemmThreads = 128;
constexpr int kStages = 4;

template <typename T>
struct GemmTile {
  static constexpr int kSize = Pack<T>::kSize;
  static constexpr int kDepth = 128 / sizeof(T);      // of k: rows of 128 bytes
  static constexpr int kPacks = kDepth / kSize;       // 8
  static constexpr int kRowsStride = kDepth + kSize;  // [64][depth], padded against bank conflicts
  static constexpr int kColsStride = kTile + kSize;   // [depth][64]
  static constexpr int kOutStride = kTile + 4;
  static constexpr int kARows = kTile * kRowsStride;
  static constexpr int kBRows = kTile * kRowsStride > kDepth* kColsStride ? kTile* kRowsStride : kDepth* kColsStride;
  static constexpr size_t kInBytes = sizeof(T) * kStages * (kARows + kBRows);
  static constexpr size_t kOutBytes = sizeof(float) * kTile * kOutStride;
  static constexpr size_t kBytes = kInBytes > kOutBytes ? kInBytes : kOutBytes;
};

// 16 bytes to shared memory, zeros if !valid.
template <typename T>
__device__ __forceinline__ void copy_async(T* to, const T* from, bool valid) {
  if (valid) {
    __pipeline_memcpy_async(to, from, 16);
  } else {
    *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
  }
}

// A row-major, k contiguous: row(m) for m < M. B either kTransposed, rows of n with k contiguous, or rows of k with n
// contiguous: b(row, offset) is a pointer to 16 bytes of it. K and, for rows of k, N are multiples of Pack<T>::kSize.
// epilogue(m, n, sum) is called once for every m < M, n < N. Launched by launch_gemm, which brings the shared memory.
template <typename T, bool kTransposed, typename A, typename B, typename Epilogue>
__device__ void gemm_tile(int M, int N, int K, int m0, int n0, A&& a, B&& b, Epilogue&& epilogue) {
  extern __shared__ __align__(128) unsigned char shared_gemm[];
  unsigned char* shared = shared_gemm;
  using Tile = GemmTile<T>;
  constexpr int kSize = Tile::kSize;
  T* a_tiles = reinterpret_cast<T*>(shared);
  T* b_tiles = a_tiles + kStages * Tile::kARows;
  const int steps = ceil_div(K, Tile::kDepth);

  const auto load = [&](int step) {
    if (step < steps) {
      const int k0 = step * Tile::kDepth;
      T* at = a_tiles + step % kStages * Tile::kARows;
      T* bt = b_tiles + step % kStages * Tile::kBRows;
#pragma unroll
      for (int i = threadIdx.x; i < kTile * Tile::kPacks; i += kGemmThreads) {
        const int row = i / Tile::kPacks;
        const int k = i % Tile::kPacks * kSize;
        const bool valid = m0 + row < M && k0 + k < K;
        copy_async(at + row * Tile::kRowsStride + k, valid ? a(m0 + row) + k0 + k : nullptr, valid);
        if constexpr (kTransposed) {
          const bool live = n0 + row < N && k0 + k < K;
          copy_async(bt + row * Tile::kRowsStride + k, live ? b(n0 + row, k0 + k) : nullptr, live);
        }
      }
      if constexpr (!kTransposed) {
        constexpr int kColPacks = kTile / kSize;
#pragma unroll
        for (int i = threadIdx.x; i < Tile::kDepth * kColPacks; i += kGemmThreads) {
          const int row = i / kColPacks;
          const int n = i % kColPacks * kSize;
          const bool live = k0 + row < K && n0 + n < N;
          copy_async(bt + row * Tile::kColsStride + n, live ? b(k0 + row, n0 + n) : nullptr, live);
        }
      }
    }
    __pipeline_commit();
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);
  float* out = reinterpret_cast<float*>(shared);

  if constexpr (sizeof(T) == 2) {
    namespace wmma = nvcuda::wmma;
    using BLayout = std::conditional_t<kTransposed, wmma::col_major, wmma::row_major>;
    const int warp = threadIdx.x / 32;
    const int wm = warp / 2 * 32;
    const int wn = warp % 2 * 32;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[2][2];
    for (auto& row : sums) {
      for (auto& sum : row) wmma::fill_fragment(sum, 0.0f);
    }
    for (int step = 0; step < steps; ++step) {
      __pipeline_wait_prior(kStages - 2);
      __syncthreads();
      load(step + kStages - 1);
      const T* at = a_tiles + step % kStages * Tile::kARows;
      const T* bt = b_tiles + step % kStages * Tile::kBRows;
#pragma unroll
      for (int k = 0; k < Tile::kDepth; k += 16) {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> af[2];
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, BLayout> bf[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          wmma::load_matrix_sync(af[i], at + (wm + 16 * i) * Tile::kRowsStride + k, Tile::kRowsStride);
          if constexpr (kTransposed) {
            wmma::load_matrix_sync(bf[i], bt + (wn + 16 * i) * Tile::kRowsStride + k, Tile::kRowsStride);
          } else {
            wmma::load_matrix_sync(bf[i], bt + k * Tile::kColsStride + wn + 16 * i, Tile::kColsStride);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) wmma::mma_sync(sums[i][j], af[i], bf[j], sums[i][j]);
        }
      }
    }
    __pipeline_wait_prior(0);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        wmma::store_matrix_sync(out + (wm + 16 * i) * Tile::kOutStride + wn + 16 * j, sums[i][j], Tile::kOutStride,
                                wmma::mem_row_major);
      }
    }
  } else {
    const int tm = threadIdx.x / 8 * 4;  // 4 rows ...
    const int tn = threadIdx.x % 8 * 8;  // ... of 8 columns
    float sums[4][8] = {};
    for (int step = 0; step < steps; ++step) {
      __pipeline_wait_prior(kStages - 2);
      __syncthreads();
      load(step + kStages - 1);
      const T* at = a_tiles + step % kStages * Tile::kARows;
      const T* bt = b_tiles + step % kStages * Tile::kBRows;
      for (int k = 0; k < Tile::kDepth; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = at[(tm + i) * Tile::kRowsStride + k];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float y = kTransposed ? bt[(tn + j) * Tile::kRowsStride + k] : bt[k * Tile::kColsStride + tn + j];
            sums[i][j] = fmaf(x, y, sums[i][j]);
          }
        }
      }
    }
    __pipeline_wait_prior(0);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) out[(tm + i) * Tile::kOutStride + tn + j] = sums[i][j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kGemmThreads) {
    const int m = m0 + i / kTile;
    const int n = n0 + i % kTile;
    if (m < M && n < N) epilogue(m, n, out[i / kTile * Tile::kOutStride + i % kTile]);
  }
}

// kernel(argument) on a grid of tiles.
template <typename T, typename Kernel, typename Argument>
cudaError_t launch_gemm(Kernel kernel, dim3 grid, const Argument& argument, cudaStream_t stream) {
  const cudaError_t code = allow_shared(kernel, GemmTile<T>::kBytes);
  if (code != cudaSuccess) return code;
  kernel<<<grid, kGemmThreads, GemmTile<T>::kBytes, stream>>>(argument);
  return cudaGetLastError();
}

// Up to three matrices, one below the other: the rows of q, k and v, or cache columns and new ones.
template <typename T>
struct Stack {
  const T* part[3];
  int start[3];  // first row of each; INT_MAX for none
  int64_t batch_stride[3];
  int stride;

  __device__ __forceinline__ int part_of(int row) const { return row >= start[2] ? 2 : row >= start[1] ? 1 : 0; }
  __device__ __forceinline__ const T* at(int batch, int row, int offset) const {
    const int i = part_of(row);
    return part[i] + batch * batch_stride[i] + static_cast<int64_t>(row - start[i]) * stride + offset;
  }
};

}  // namespace lococo::trt
