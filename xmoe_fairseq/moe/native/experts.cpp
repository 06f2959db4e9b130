// y_s = the sum of weight_r * FFN_e(x_s) over the rows r of source s, each of one expert e.
#include "experts.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu_backward_cpu_dispatch.h>
#include <ATen/ops/gelu_cpu_dispatch.h>
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

constexpr int64_t FEW = 4;  // rows

// Room for the largest piece of a share, in tiles and in rows.
struct Buffers {
  Tensor x, hidden, y, inner_nF, hidden_nF, y_8D;

  Buffers(const Call& call, int64_t most)
      : x(room({padded(most), call.D()}, call.x_SD)),
        hidden(room({padded(most), call.F()}, call.x_SD)),
        y(room({padded(most), call.D()}, call.x_SD)),
        inner_nF(room({call.activates_rows() ? most : 0, call.F()}, call.x_SD)),
        hidden_nF(room({call.activates_rows() ? most : 0, call.F()}, call.x_SD)),
        y_8D(room({TURN, call.D()}, call.x_SD)) {}
};

// The hidden layer's tiles. inner_nF: what the backward pass needs of it (relu's output, others' input); or null.
template <class T>
void first_layer(const Call& call, const Piece& piece, Buffers& room, T* inner_nF) {
  const int64_t n = piece.rows(), e = piece.expert, D = call.D(), F = call.F();
  const T *weight = call.fc1_weight.const_data_ptr<T>() + e * F * D, *bias = call.fc1_bias.const_data_ptr<T>() + e * F;
  T* tiles = room.hidden.mutable_data_ptr<T>();
  constexpr bool once = !std::is_same_v<T, Sum<T>>;  // rounded once: twice would move many across relu's 0
  const bool relu = call.activation == RELU;
  if (once) each_tile<T>(n, [&](int64_t first, int64_t rows) {
    for (int64_t f = 0; f < F; ++f) std::fill_n(tiles + first * F + f * padded(rows), padded(rows), bias[f]);
  });
  multiply_tiles(tiles, weight, room.x.const_data_ptr<T>(), n, F, D, once);
  each_tile<T>(n, [&](int64_t first, int64_t rows) {
    T* tile = tiles + first * F;
    if (!once) add_bias(tile, bias, F, padded(rows), relu);
    if (once && relu) relu_forward(tile, F * padded(rows));
    if (inner_nF) from_tile(inner_nF + first * F, tile, padded(rows), 0, rows, F);
  });
}

// What has to see the hidden layer row by row: dropout, and activations other than relu. Returns these rows.
template <class T>
T* activate_rows(const Call& call, const Piece& piece, Buffers& room, T* inner_nF) {
  const int64_t n = piece.rows(), F = call.F();
  T* hidden_nF = inner_nF;
  if (call.activation != RELU) {
    auto hidden = matrix(room.hidden_nF, 0, n, F);
    hidden_nF = hidden.mutable_data_ptr<T>();
    activate(hidden, at::from_blob(inner_nF, {n, F}, hidden.scalar_type()), call.activation);
  }
  if (call.keep_RF)
    drop(hidden_nF, call.keep_RF->const_data_ptr<bool>() + piece.begin * F, Sum<T>(call.scale), n * F);
  return hidden_nF;
}

template <class T>
void add_rows(const Call& call, const Piece& piece, const T* rows, int64_t first, int64_t count, Sum<T>* y_SD) {
  const int64_t D = call.D(), begin = piece.begin + first;
  const int64_t* source = call.source_R.const_data_ptr<int64_t>() + begin;
  const auto* weight = call.weight_R ? call.weight_R->const_data_ptr<Sum<T>>() + begin : nullptr;
  const T* bias = call.fc2_bias.const_data_ptr<T>() + piece.expert * D;
  for (int64_t r = 0; r < count; ++r)
    add_weighted(y_SD + source[r] * D, rows + r * D, bias, weight ? weight[r] : Sum<T>(1), D);
}

// One piece's weighted outputs, added to the share's y_SD. inner_nF: to be filled, or null.
template <class T>
void sums_of_piece(const Call& call, const Piece& piece, Buffers& room, T* inner_nF, Sum<T>* y_SD) {
  const int64_t n = piece.rows(), e = piece.expert, D = call.D(), F = call.F();
  const int64_t* source = call.source_R.const_data_ptr<int64_t>() + piece.begin;
  to_tiles(room.x.mutable_data_ptr<T>(), call.x_SD.const_data_ptr<T>(), source, n, D);
  if (!inner_nF && call.activates_rows()) inner_nF = room.inner_nF.mutable_data_ptr<T>();
  first_layer(call, piece, room, inner_nF);
  T *hidden = room.hidden.mutable_data_ptr<T>(), *tiles = room.y.mutable_data_ptr<T>();
  if (call.activates_rows()) to_tiles<T>(hidden, activate_rows(call, piece, room, inner_nF), nullptr, n, F);
  multiply_tiles<T>(tiles, call.fc2_weight.const_data_ptr<T>() + e * D * F, hidden, n, D, F);
  T* y_8D = room.y_8D.mutable_data_ptr<T>();
  each_tile<T>(n, [&](int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; r += TURN) {
      const int64_t count = std::min(TURN, rows - r);
      from_tile(y_8D, tiles + first * D, padded(rows), r, count, D);
      add_rows(call, piece, y_8D, first + r, count, y_SD);
    }
  });
}

// The same of so few rows that it is reading the weights which takes the time: vectors' products, of rows
// where they lie.
template <class T>
void sums_of_few(const Call& call, const Piece& piece, Buffers& room, T* inner_nF, Sum<T>* y_SD) {
  const int64_t n = piece.rows(), e = piece.expert, D = call.D(), F = call.F();
  const int64_t* source = call.source_R.const_data_ptr<int64_t>() + piece.begin;
  std::array<const T*, FEW> rows;
  for (int64_t r = 0; r < n; ++r) rows[r] = call.x_SD.const_data_ptr<T>() + source[r] * D;
  if (!inner_nF) inner_nF = room.hidden.mutable_data_ptr<T>();
  dots(inner_nF, rows.data(), n, call.fc1_weight.const_data_ptr<T>() + e * F * D,
       call.fc1_bias.const_data_ptr<T>() + e * F, F, D, call.activation == RELU);
  const T* hidden_nF = activate_rows(call, piece, room, inner_nF);
  for (int64_t r = 0; r < n; ++r) rows[r] = hidden_nF + r * F;
  T* y_nD = room.y.mutable_data_ptr<T>();
  dots(y_nD, rows.data(), n, call.fc2_weight.const_data_ptr<T>() + e * D * F, nullptr, D, F, false);
  add_rows(call, piece, y_nD, 0, n, y_SD);
}

// inner_RF: what the backward pass needs of the hidden layer; or empty.
template <class T>
Tensor sums(const Call& call, Tensor inner_RF, bool for_backward) {
  const int64_t S = call.S(), D = call.D(), F = call.F();
  const auto shares = shares_of(call.counts_E, D * F);
  const int64_t N = shares.size();
  Tensor sums_NSD = at::detail::empty_cpu({N, S, D}, c10::CppTypeToScalarType<Sum<T>>::value);
  in_threads(N, [&](int64_t s) {
    auto* y_SD = sums_NSD.mutable_data_ptr<Sum<T>>() + s * S * D;
    std::fill_n(y_SD, S * D, Sum<T>(0));
    Buffers room(call, shares[s].most_rows);
    T* inner = for_backward ? inner_RF.mutable_data_ptr<T>() : nullptr;
    for (const auto& piece : shares[s].pieces) {
      const auto compute = piece.rows() <= FEW ? sums_of_few<T> : sums_of_piece<T>;
      compute(call, piece, room, inner ? inner + piece.begin * F : nullptr, y_SD);
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
