// y_s = the sum of weight_r * FFN_e(x_s) over the rows r of source s, each of one expert e.
#include "experts.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/addmv_cpu_dispatch.h>
#include <ATen/ops/gelu_backward_cpu_dispatch.h>
#include <ATen/ops/gelu_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/silu_backward_cpu_dispatch.h>
#include <ATen/ops/silu_cpu_dispatch.h>
#include <torch/library.h>

namespace xmoe {

void Call::check() {
  const auto sums = at::toOpMathType(x_SD.scalar_type());
  TORCH_CHECK(x_SD.dim() == 2 && fc1_weight.dim() == 3, "x must be (S, D) and fc1_weight (E, F, D)");
  const auto fits = [&](const Tensor& stack, at::IntArrayRef sizes) {
    return stack.sizes() == sizes && stack.scalar_type() == x_SD.scalar_type() && stack.is_cpu();
  };
  TORCH_CHECK(fits(fc1_weight, {E(), F(), D()}) && fits(fc1_bias, {E(), F()}) &&
                  fits(fc2_weight, {E(), D(), F()}) && fits(fc2_bias, {E(), D()}),
              "the experts' parameters must be of x's type and fit each other");
  TORCH_CHECK(source_R.scalar_type() == at::kLong && counts_E.scalar_type() == at::kLong &&
                  counts_E.dim() == 1 && counts_E.numel() == E(),
              "source_R and counts_E must be int64, a count per expert");
  TORCH_CHECK(!weight_R || (weight_R->scalar_type() == sums && weight_R->numel() == R()),
              "weight_R must be in the type of the sums, one per row");
  TORCH_CHECK(!keep_RF || (keep_RF->scalar_type() == at::kBool && keep_RF->numel() == R() * F()),
              "keep_RF must be bool, (R, F)");
  for (auto* tensor : {&x_SD, &source_R, &counts_E, &fc1_weight, &fc1_bias, &fc2_weight, &fc2_bias})
    *tensor = tensor->contiguous();
  for (auto* tensor : {&weight_R, &keep_RF})
    if (*tensor) *tensor = (*tensor)->contiguous();
  int64_t rows = 0;
  const int64_t* counts = counts_E.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < E(); ++e) {
    TORCH_CHECK(counts[e] >= 0, "an expert has ", counts[e], " rows");
    rows += counts[e];
  }
  TORCH_CHECK(rows == R(), "the experts have ", rows, " rows together, source_R has ", R());
  const int64_t* source = source_R.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < R(); ++r)
    TORCH_CHECK_INDEX(0 <= source[r] && source[r] < S(), "source row ", source[r], " of ", S());
}

void activate(Tensor& hidden_nF, const Tensor& inner_nF, Activation activation) {
  if (activation == GELU) at::cpu::gelu_out(hidden_nF, inner_nF);
  if (activation == SILU) at::cpu::silu_out(hidden_nF, inner_nF);
}

void activate_backward(Tensor& grad_nF, const Tensor& inner_nF, Activation activation) {
  if (activation == GELU) at::cpu::gelu_backward_out(grad_nF, grad_nF, inner_nF);
  if (activation == SILU) at::cpu::silu_backward_out(grad_nF, grad_nF, inner_nF);
}

void product(Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (add) {
    at::cpu::addmm_out(out, out, a, b);
  } else {
    at::cpu::mm_out(out, a, b);
  }
}

Tensor added_up(const Tensor& sums_NSD, at::ScalarType dtype) {
  const int64_t shares = sums_NSD.size(0), S = sums_NSD.size(1), D = sums_NSD.size(2);
  auto first_SD = sums_NSD.select(0, 0);
  const bool convert_it = dtype != sums_NSD.scalar_type();
  auto y_SD = convert_it ? at::Tensor(at::detail::empty_cpu({S, D}, dtype)) : first_SD;
  if (shares == 1 && !convert_it) return y_SD;
  XMOE_DISPATCH(dtype, [&] {
    using Sum = xmoe::Sum<scalar_t>;
    auto* sums = sums_NSD.mutable_data_ptr<Sum>();
    auto* y = y_SD.mutable_data_ptr<scalar_t>();
    in_parts(S, 1 + (1 << 15) / (D * shares + 1), [&](int64_t begin, int64_t end) {
      const int64_t from = begin * D, size = (end - begin) * D;
      for (int64_t s = 1; s < shares; ++s) sum_into(sums + from, sums + s * S * D + from, size);
      if (convert_it) convert(y + from, sums + from, size);
    });
  });
  return y_SD;
}

namespace {

// Before the activation, or after it if that is relu.
template <class T>
void first_layer(const Call& call, int64_t e, const Tensor& x_nD, Tensor& inner_nF) {
  const int64_t n = x_nD.size(0), D = call.D(), F = call.F();
  const auto w1 = matrix(call.fc1_weight, e * F, F, D, true);
  const T* bias = call.fc1_bias.const_data_ptr<T>() + e * F;
  T* inner = inner_nF.mutable_data_ptr<T>();
  const bool relu = call.activation == RELU;
  if constexpr (std::is_same_v<T, Sum<T>>) {
    product(inner_nF, x_nD, w1);
    add_bias(inner, bias, n, F, relu);
  } else {  // rounded once: in bf16 a second time would move many to the other side of relu's 0
    for (int64_t r = 0; r < n; ++r) std::copy_n(bias, F, inner + r * F);
    product(inner_nF, x_nD, w1, true);
    if (relu) relu_forward(inner, n * F);
  }
}

// One piece's weighted outputs, added to the share's y_SD. `x_bD` and `y_bD` are room for the largest piece.
template <class T>
void sums_of_piece(const Call& call, const Piece& piece, Tensor& x_bD, Tensor& y_bD, Tensor& inner_nF,
                   Tensor& hidden_nF, Sum<T>* y_SD) {
  const int64_t n = piece.rows(), e = piece.expert, D = call.D(), F = call.F();
  const int64_t* source = call.source_R.const_data_ptr<int64_t>() + piece.begin;
  const bool is_alone = n == 1;  // read where it lies
  if (!is_alone) gather(x_bD.mutable_data_ptr<T>(), call.x_SD.const_data_ptr<T>(), source, n, D);
  const auto x_nD = is_alone ? matrix(call.x_SD, *source, 1, D) : matrix(x_bD, 0, n, D);
  first_layer<T>(call, e, x_nD, inner_nF);
  if (call.activation != RELU) activate(hidden_nF, inner_nF, call.activation);
  if (call.keep_RF) {
    const bool* keep = call.keep_RF->const_data_ptr<bool>() + piece.begin * F;
    drop(hidden_nF.mutable_data_ptr<T>(), keep, Sum<T>(call.scale), n * F);
  }
  auto y_nD = matrix(y_bD, 0, n, D);
  product(y_nD, hidden_nF, matrix(call.fc2_weight, e * D, D, F, true));
  const auto* weight = call.weight_R ? call.weight_R->const_data_ptr<Sum<T>>() + piece.begin : nullptr;
  const T* bias = call.fc2_bias.const_data_ptr<T>() + e * D;
  const T* y = y_bD.const_data_ptr<T>();
  for (int64_t r = 0; r < n; ++r)
    add_weighted(y_SD + source[r] * D, y + r * D, bias, weight ? weight[r] : Sum<T>(1), D);
}

// inner_RF: what the backward pass needs of the hidden layer (relu's output, others' input); or empty.
template <class T>
Tensor sums(const Call& call, Tensor inner_RF, bool for_backward) {
  const int64_t S = call.S(), D = call.D(), F = call.F();
  const auto shares = shares_of(call.counts_E, D * F);
  const int64_t N = shares.size();
  Tensor sums_NSD = at::detail::empty_cpu({N, S, D}, c10::CppTypeToScalarType<Sum<T>>::value);
  in_threads(N, [&](int64_t s) {
    const int64_t most = shares[s].most_rows;
    auto* y_SD = sums_NSD.mutable_data_ptr<Sum<T>>() + s * S * D;
    std::fill_n(y_SD, S * D, Sum<T>(0));
    auto x_bD = room({most, D}, call.x_SD), y_bD = room({most, D}, call.x_SD);
    auto inner_bF = for_backward ? inner_RF : room({most, F}, call.x_SD);
    auto hidden_bF = for_backward && call.activation != RELU ? room({most, F}, call.x_SD) : inner_bF;
    for (const auto& piece : shares[s].pieces) {
      auto inner_nF = matrix(inner_bF, for_backward ? piece.begin : 0, piece.rows(), F);
      auto hidden_nF = call.activation == RELU ? inner_nF : matrix(hidden_bF, 0, piece.rows(), F);
      sums_of_piece<T>(call, piece, x_bD, y_bD, inner_nF, hidden_nF, y_SD);
    }
  });
  const auto dtype = call.weight_R ? call.weight_R->scalar_type() : call.x_SD.scalar_type();
  return added_up(sums_NSD, dtype);
}

std::tuple<Tensor, Tensor> expert_sums(
    const Tensor& x_SD, const Tensor& source_R, const std::optional<Tensor>& weight_R, const Tensor& counts_E,
    const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias,
    int64_t activation, const std::optional<Tensor>& keep_RF, double scale, bool for_backward) {
  at::AutoDispatchBelowADInplaceOrView below;
  AloneInFork alone;
  Call call{x_SD, source_R, weight_R, counts_E, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
            Activation(activation), keep_RF, scale};
  call.check();
  auto inner_RF = room({for_backward ? call.R() : 0, call.F()}, x_SD);
  Tensor y_SD;
  XMOE_DISPATCH(x_SD.scalar_type(), [&] { y_SD = sums<scalar_t>(call, inner_RF, for_backward); });
  return {y_SD, inner_RF};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xmoe, m) {
  m.def(
      "expert_sums(Tensor x, Tensor source, Tensor? weight, Tensor counts, Tensor fc1_weight, "
      "Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, int activation, Tensor? keep, float scale, "
      "bool for_backward) -> (Tensor y, Tensor inner)");
}
TORCH_LIBRARY_IMPL(xmoe, CPU, m) { m.impl("expert_sums", &expert_sums); }

}  // namespace xmoe
