#include "loops.h"

#include <cstring>

// XMOE_ONE_KIND: sanitizers start after the code that chooses.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(XMOE_ONE_KIND)
#define KINDS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define KINDS
#endif

namespace xmoe {

// bias_F and the like never lie inside what is written: without the promise vectors need a check per call.
#define R __restrict

#define XMOE_LOOPS(T, S)                                                                                     \
  KINDS void add_bias(T* R hidden_nF, const T* R bias_F, int64_t n, int64_t F, bool relu) {                  \
    for (int64_t r = 0; r < n; ++r, hidden_nF += F) {                                                        \
      if (relu) {                                                                                            \
        for (int64_t f = 0; f < F; ++f) {                                                                    \
          const S value = S(hidden_nF[f]) + S(bias_F[f]);                                                    \
          hidden_nF[f] = T(value <= 0 ? S(0) : value);                                                       \
        }                                                                                                    \
      } else {                                                                                               \
        for (int64_t f = 0; f < F; ++f) hidden_nF[f] = T(S(hidden_nF[f]) + S(bias_F[f]));                    \
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

}  // namespace xmoe
