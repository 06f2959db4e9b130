// Matrix products with one expert's rows.
//
// ATen's block product (brgemm) reads both factors row by row, as they lie: it packs nothing, which takes mm a
// third of its time where an expert has few rows. So no weight is transposed, rows are, and few: x W^T comes as
// W x^T, of *tiles*. A tile holds up to TILE rows as columns, (width, padded(rows)); tiles lie one behind the
// other, what is padded is 0 or finite and nobody's. Types without a block product have one tile, for mm.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <limits>

#include "loops.h"

namespace xmoe {

#ifdef CPUBLAS_BRGEMM_F32F32F32
template <class T> constexpr bool HAS_BLOCKS = std::is_same_v<T, float>;
#else
template <class T> constexpr bool HAS_BLOCKS = false;
#endif
constexpr int64_t BLOCK = 64, LANES = 16;
template <class T> constexpr int64_t TILE = HAS_BLOCKS<T> ? BLOCK : std::numeric_limits<int64_t>::max();

inline int64_t padded(int64_t rows) { return (rows + LANES - 1) / LANES * LANES; }

// c (M, N) = a (M, K) @ b (K, N), or what is there plus it. Row by row; ld: numbers from one row to the next.
template <class T>
void multiply(T* c, int64_t ld_c, const T* a, int64_t ld_a, const T* b, int64_t ld_b, int64_t M, int64_t N,
              int64_t K, bool add = false);

// Calls use(first row, rows, what lies before the tile) of each tile of n rows.
template <class T, class Use>
void each_tile(int64_t n, const Use& use) {
  for (int64_t first = 0; first < n; first += std::min(TILE<T>, n - first))
    use(first, std::min(TILE<T>, n - first));
}

// tiles (M) = weight (M, K) @ tiles (K), of n rows; or what is there plus it.
template <class T>
void multiply_tiles(T* to, const T* weight, const T* tiles, int64_t n, int64_t M, int64_t K, bool add = false) {
  const int64_t step = HAS_BLOCKS<T> ? BLOCK : M;  // of the weight, which then stays in the cache for all tiles
  for (int64_t m = 0; m < M; m += step)
    each_tile<T>(n, [&](int64_t first, int64_t rows) {
      const int64_t ld = padded(rows);
      multiply(to + first * M + m * ld, ld, weight + m * K, K, tiles + first * K, ld, std::min(step, M - m), ld,
               K, add);
    });
}

// Rows (n, width) -> tiles; of `source`, if it is given, row source[r].
template <class T>
void to_tiles(T* tiles, const T* rows, const int64_t* source, int64_t n, int64_t width);

// The opposite, of the rows first, ..., first + count - 1 of a tile's.
template <class T>
void from_tile(T* rows, const T* tile, int64_t ld, int64_t first, int64_t count, int64_t width) {
  transpose(rows, width, tile + first, ld, width, count);
}

}  // namespace xmoe
