// The loops between the matrix products, for float, double and BFloat16 (whose sums are float).
//
// Plain loops: the compiler turns them into vectors, once per kind of processor, and the right kind is chosen
// when the library is loaded. Sums have one order per kind.
#pragma once
#include <c10/util/BFloat16.h>
#include <cstdint>

namespace xmoe {

constexpr int64_t TURN = 8;  // rows that are turned into columns together

template <class T> struct sum_of { using type = T; };
template <> struct sum_of<c10::BFloat16> { using type = float; };
template <class T> using Sum = typename sum_of<T>::type;

#define XMOE_LOOPS(T, S)                                                                                     \
  /* to[c * to_ld + r] = from[r * from_ld + c] */                                                            \
  void transpose(T* to, int64_t to_ld, const T* from, int64_t from_ld, int64_t rows, int64_t columns);       \
  /* to[w * ld + i] = from[i][w], i < TURN; null = 0 */                                                      \
  void turn_rows(T* to, int64_t ld, const T* const* from, int64_t width);                                    \
  /* hidden_Fn += bias_F, (F, n); with relu what is negative becomes 0, NaN stays */                         \
  void add_bias(T* hidden_Fn, const T* bias_F, int64_t F, int64_t n, bool relu);                             \
  void relu_forward(T* values, int64_t size);                                                                \
  /* values *= is kept ? scale : 0 */                                                                        \
  void drop(T* values, const bool* keep, S scale, int64_t size);                                             \
  /* y_D += weight * (row_D + bias_D) */                                                                     \
  void add_weighted(S* y_D, const T* row_D, const T* bias_D, S weight, int64_t D);                           \
  void add(S* y_D, const T* row_D, int64_t D);                                                               \
  /* bias_grad_D += weight * grad_D, where it is wanted; the sum of grad_D * bias_D */                       \
  S second_bias(S* bias_grad_D, const T* grad_D, const T* bias_D, S weight, int64_t D);                      \
  S dot(const T* a_F, const T* b_F, int64_t F);                                                              \
  /* to[r * M + m] = x[r] . weight[m] + bias[m], of n rows x of width K; no bias = 0; with relu as above */  \
  void dots(T* to, const T* const* x, int64_t n, const T* weight, const T* bias, int64_t M, int64_t K,       \
            bool relu);                                                                                      \
  void scale(T* to_F, const T* from_F, S by, int64_t F);                                                     \
  /* grad_F = hidden_F > 0 ? by * grad_F : 0, of hidden_F = relu(...) */                                     \
  void relu_backward(T* grad_F, const T* hidden_F, S by, int64_t F);
XMOE_LOOPS(float, float)
XMOE_LOOPS(double, double)
XMOE_LOOPS(c10::BFloat16, float)
#undef XMOE_LOOPS

void convert(float* to, const float* from, int64_t size);
void convert(double* to, const double* from, int64_t size);
void convert(c10::BFloat16* to, const float* from, int64_t size);
void sum_into(float* to, const float* from, int64_t size);
void sum_into(double* to, const double* from, int64_t size);

// rank_E: how many of p_E come before each: the larger ones, of equals those of lower index. Of bits, which
// order as the probabilities do and put NaN somewhere: every rank is there once, whatever they are.
void ranks(int32_t* rank_E, const int32_t* bits_E, int32_t E);
void ranks(int64_t* rank_E, const int64_t* bits_E, int64_t E);
// The largest's index, of equals the lower; it becomes the least.
int64_t take_largest(int32_t* bits_E, int32_t E);
int64_t take_largest(int64_t* bits_E, int64_t E);

}  // namespace xmoe
