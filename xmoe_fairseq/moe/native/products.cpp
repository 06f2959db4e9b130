#include "products.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <array>

namespace xmoe {

namespace {

template <class T>
at::Tensor view(const T* data, int64_t rows, int64_t columns, int64_t ld) {
  return at::from_blob(const_cast<T*>(data), {rows, columns}, {ld, 1}, c10::CppTypeToScalarType<T>::value);
}

}  // namespace

template <class T>
void multiply(T* c, int64_t ld_c, const T* a, int64_t ld_a, const T* b, int64_t ld_b, int64_t M, int64_t N,
              int64_t K, bool add) {
  if constexpr (HAS_BLOCKS<T>) {
    for (int64_t n = 0; n < N; n += BLOCK)
      for (int64_t m = 0; m < M; m += BLOCK)
        at::native::cpublas::brgemm(std::min(BLOCK, M - m), std::min(BLOCK, N - n), K, ld_a, ld_b, ld_c, add,
                                    a + m * ld_a, b + n, c + m * ld_c + n);
  } else {
    auto out = view(c, M, N, ld_c);
    if (add) {
      at::cpu::addmm_out(out, out, view(a, M, K, ld_a), view(b, K, N, ld_b));
    } else {
      at::cpu::mm_out(out, view(a, M, K, ld_a), view(b, K, N, ld_b));
    }
  }
}

template <class T>
void to_tiles(T* tiles, const T* rows, const int64_t* source, int64_t n, int64_t width) {
  each_tile<T>(n, [&](int64_t first, int64_t count) {
    const int64_t ld = padded(count);
    for (int64_t r = 0; r < ld; r += TURN) {
      std::array<const T*, TURN> turn{};
      for (int64_t i = 0; i < std::min(TURN, count - r); ++i)
        turn[i] = rows + (source ? source[first + r + i] : first + r + i) * width;
      turn_rows(tiles + first * width + r, ld, turn.data(), width);
    }
  });
}

#define XMOE_PRODUCTS(T)                                                                                     \
  template void multiply<T>(T*, int64_t, const T*, int64_t, const T*, int64_t, int64_t, int64_t, int64_t,    \
                            bool);                                                                           \
  template void to_tiles<T>(T*, const T*, const int64_t*, int64_t, int64_t);
XMOE_PRODUCTS(float)
XMOE_PRODUCTS(double)
XMOE_PRODUCTS(c10::BFloat16)

}  // namespace xmoe
