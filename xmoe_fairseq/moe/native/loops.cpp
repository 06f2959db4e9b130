#include "loops.h"

#include <algorithm>
#include <cstring>
#include <limits>

// XMOE_ONE_KIND: sanitizers start after the code that chooses.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(XMOE_ONE_KIND)
#define KINDS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define KINDS
#endif

namespace xmoe {

// bias_F and the like never lie inside what is written: without the promise vectors need a check per call.
#define R __restrict

// Columns -> rows of 8 x 8 numbers, in three rounds of pairs.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef MIX
#define MIX(a, b, ...) __builtin_shuffle(a, b, Places8{__VA_ARGS__})
#endif
typedef float Floats8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t Places8 __attribute__((vector_size(32)));

inline __attribute__((always_inline)) void turn_block(float* to, int64_t ld, const float* const* from,
                                                      int64_t offset) {
  static const Floats8 zero{};
  Floats8 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    const auto one = from[i] ? *(const Floats8*)(from[i] + offset) : zero;
    const auto two = from[i + 1] ? *(const Floats8*)(from[i + 1] + offset) : zero;
    a[i] = MIX(one, two, 0, 8, 1, 9, 4, 12, 5, 13), a[i + 1] = MIX(one, two, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = MIX(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] = MIX(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    *(Floats8*)(to + i * ld) = MIX(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *(Floats8*)(to + (i + 4) * ld) = MIX(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

template <class T>
inline __attribute__((always_inline)) void turn_block(T* to, int64_t ld, const T* const* from, int64_t offset) {
  for (int64_t w = 0; w < TURN; ++w)
    for (int64_t i = 0; i < TURN; ++i) to[w * ld + i] = from[i] ? from[i][offset + w] : T(0);
}

#define XMOE_LOOPS(T, S)                                                                                     \
  KINDS void turn_rows(T* R to, int64_t ld, const T* const* from, int64_t width) {                           \
    int64_t w = 0;                                                                                           \
    for (; w + TURN <= width; w += TURN) turn_block(to + w * ld, ld, from, w);                               \
    for (; w < width; ++w)                                                                                   \
      for (int64_t i = 0; i < TURN; ++i) to[w * ld + i] = from[i] ? from[i][w] : T(0);                       \
  }                                                                                                          \
  KINDS void transpose(T* R to, int64_t to_ld, const T* R from, int64_t from_ld, int64_t rows,               \
                       int64_t columns) {                                                                    \
    int64_t r = 0;                                                                                           \
    for (; r + TURN <= rows && columns >= TURN; r += TURN) {                                                 \
      const T* turn[TURN];                                                                                   \
      for (int64_t i = 0; i < TURN; ++i) turn[i] = from + (r + i) * from_ld;                                 \
      int64_t c = 0;                                                                                         \
      for (; c + TURN <= columns; c += TURN) turn_block(to + c * to_ld + r, to_ld, turn, c);                 \
      for (; c < columns; ++c)                                                                               \
        for (int64_t i = 0; i < TURN; ++i) to[c * to_ld + r + i] = turn[i][c];                               \
    }                                                                                                        \
    for (; r < rows; ++r)                                                                                    \
      for (int64_t c = 0; c < columns; ++c) to[c * to_ld + r] = from[r * from_ld + c];                       \
  }                                                                                                          \
  KINDS void add_bias(T* R hidden_Fn, const T* R bias_F, int64_t F, int64_t n, bool relu) {                  \
    for (int64_t f = 0; f < F; ++f, hidden_Fn += n) {                                                        \
      const S bias = S(bias_F[f]);                                                                           \
      if (relu) {                                                                                            \
        for (int64_t i = 0; i < n; ++i) {                                                                    \
          const S value = S(hidden_Fn[i]) + bias;                                                            \
          hidden_Fn[i] = T(value <= 0 ? S(0) : value);                                                       \
        }                                                                                                    \
      } else {                                                                                               \
        for (int64_t i = 0; i < n; ++i) hidden_Fn[i] = T(S(hidden_Fn[i]) + bias);                            \
      }                                                                                                      \
    }                                                                                                        \
  }                                                                                                          \
  KINDS void relu_forward(T* values, int64_t size) {                                                         \
    _Pragma("omp simd")                                                                                      \
    for (int64_t i = 0; i < size; ++i) values[i] = S(values[i]) <= 0 ? T(0) : values[i];                     \
  }                                                                                                          \
  KINDS void drop(T* R values, const bool* R keep, S scale, int64_t size) {                                  \
    for (int64_t i = 0; i < size; ++i) values[i] = T(S(values[i]) * (keep[i] ? scale : S(0)));               \
  }                                                                                                          \
  KINDS void add_weighted(S* R y_D, const T* R row_D, const T* R bias_D, S weight, int64_t D) {              \
    for (int64_t d = 0; d < D; ++d) y_D[d] += weight * (S(row_D[d]) + S(bias_D[d]));                         \
  }                                                                                                          \
  KINDS void add(S* R y_D, const T* R row_D, int64_t D) {                                                    \
    for (int64_t d = 0; d < D; ++d) y_D[d] += S(row_D[d]);                                                   \
  }                                                                                                          \
  KINDS S second_bias(S* R bias_grad_D, const T* R grad_D, const T* R bias_D, S weight, int64_t D) {         \
    S sum = 0;                                                                                               \
    if (bias_grad_D) {                                                                                       \
      for (int64_t d = 0; d < D; ++d) bias_grad_D[d] += weight * S(grad_D[d]);                               \
    }                                                                                                        \
    _Pragma("omp simd reduction(+ : sum)")                                                                   \
    for (int64_t d = 0; d < D; ++d) sum += S(grad_D[d]) * S(bias_D[d]);                                      \
    return sum;                                                                                              \
  }                                                                                                          \
  KINDS S dot(const T* R a_F, const T* R b_F, int64_t F) {                                                   \
    S sum = 0;                                                                                               \
    _Pragma("omp simd reduction(+ : sum)")                                                                   \
    for (int64_t f = 0; f < F; ++f) sum += S(a_F[f]) * S(b_F[f]);                                            \
    return sum;                                                                                              \
  }                                                                                                          \
  KINDS void dots(T* R to, const T* const* x, int64_t n, const T* R weight, const T* R bias, int64_t M,      \
                  int64_t K, bool relu) {                                                                    \
    for (int64_t m = 0; m < M; ++m, weight += K)                                                             \
      for (int64_t r = 0; r < n; ++r) {                                                                      \
        const T* row = x[r];                                                                                 \
        S sum = 0;                                                                                           \
        _Pragma("omp simd reduction(+ : sum)")                                                               \
        for (int64_t k = 0; k < K; ++k) sum += S(weight[k]) * S(row[k]);                                     \
        sum += bias ? S(bias[m]) : S(0);                                                                     \
        to[r * M + m] = T(relu && sum <= 0 ? S(0) : sum);                                                    \
      }                                                                                                      \
  }                                                                                                          \
  KINDS void scale(T* to_F, const T* from_F, S by, int64_t F) {                                              \
    _Pragma("omp simd")                                                                                      \
    for (int64_t f = 0; f < F; ++f) to_F[f] = T(S(from_F[f]) * by);                                          \
  }                                                                                                          \
  KINDS void relu_backward(T* R grad_F, const T* R hidden_F, S by, int64_t F) {                              \
    for (int64_t f = 0; f < F; ++f) grad_F[f] = S(hidden_F[f]) <= 0 ? T(0) : T(S(grad_F[f]) * by);           \
  }
XMOE_LOOPS(float, float)
XMOE_LOOPS(double, double)
XMOE_LOOPS(c10::BFloat16, float)

void convert(float* to, const float* from, int64_t size) { std::memcpy(to, from, size * sizeof(float)); }
void convert(double* to, const double* from, int64_t size) { std::memcpy(to, from, size * sizeof(double)); }
KINDS void convert(c10::BFloat16* R to, const float* R from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = c10::BFloat16(from[i]);
}
KINDS void sum_into(float* R to, const float* R from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}
KINDS void sum_into(double* R to, const double* R from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

#define XMOE_RANKS(I)                                                                                        \
  KINDS void ranks(I* R rank_E, const I* R bits_E, I E) {                                                    \
    for (I e = 0; e < E; ++e) rank_E[e] = 0;                                                                 \
    for (I j = 0; j < E; ++j) {                                                                              \
      const I other = bits_E[j];                                                                             \
      for (I e = 0; e < j; ++e) rank_E[e] += other > bits_E[e];                                              \
      for (I e = j + 1; e < E; ++e) rank_E[e] += other >= bits_E[e];                                         \
    }                                                                                                        \
  }
XMOE_RANKS(int32_t)
XMOE_RANKS(int64_t)

#define XMOE_TAKE(I)                                                                                         \
  KINDS int64_t take_largest(I* R bits_E, I E) {                                                             \
    constexpr I LEAST = std::numeric_limits<I>::min();                                                       \
    I largest = LEAST, place = E;                                                                            \
    for (I e = 0; e < E; ++e) largest = std::max(largest, bits_E[e]);                                        \
    for (I e = 0; e < E; ++e) place = std::min(place, bits_E[e] == largest ? e : E);                         \
    bits_E[place] = LEAST;                                                                                   \
    return place;                                                                                            \
  }
XMOE_TAKE(int32_t)
XMOE_TAKE(int64_t)

}  // namespace xmoe
