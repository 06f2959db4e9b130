// What the experts' forward and backward pass share.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <optional>

#include "products.h"
#include "shares.h"

namespace xmoe {

using at::Tensor;

enum Activation : int64_t { RELU, GELU, SILU };  // numbers known to experts/native.py

// R rows in order of expert, of S source rows; E experts of width F.
struct Call {
  Tensor x_SD, source_R;
  std::optional<Tensor> weight_R;  // in the type of the sums; none = 1
  Tensor counts_E, fc1_weight, fc1_bias, fc2_weight, fc2_bias;
  Activation activation;
  std::optional<Tensor> keep_RF;  // dropout: what is kept, times scale
  double scale;

  int64_t S() const { return x_SD.size(0); }
  int64_t D() const { return x_SD.size(1); }
  int64_t R() const { return source_R.size(0); }
  int64_t E() const { return fc1_weight.size(0); }
  int64_t F() const { return fc1_weight.size(1); }
  bool activates_rows() const { return activation != RELU || keep_RF; }
  // Contiguous, and nothing that would be read outside its memory.
  void check();
};

// The activation's output from its input, and the gradient of that from the output's, in place; not of relu.
void activate(Tensor& hidden_nF, const Tensor& inner_nF, Activation activation);
void activate_backward(Tensor& grad_nF, const Tensor& inner_nF, Activation activation);

template <class T>
void gather(T* to_nD, const T* from_SD, const int64_t* source_n, int64_t n, int64_t D) {
  for (int64_t r = 0; r < n; ++r) std::copy_n(from_SD + source_n[r] * D, D, to_nD + r * D);
}

// Each share's (S, D) sums -> those of all, in the type that is asked for; the shares' are used up.
Tensor added_up(const Tensor& sums_NSD, at::ScalarType dtype);

#define XMOE_DISPATCH(TYPE, ...)                                                                             \
  AT_DISPATCH_SWITCH(TYPE, "xmoe", AT_DISPATCH_CASE_FLOATING_TYPES(__VA_ARGS__)                              \
                                       AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

}  // namespace xmoe
