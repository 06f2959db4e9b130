// The gradients of experts.cpp: those that somebody wants, and no product for the others.
#include <torch/library.h>

#include "experts.h"

namespace xmoe {

namespace {

// Undefined = nobody wants it. x: each share's (S, D), in the type of the sums.
struct Gradients {
  Tensor x, weight_R, fc1_weight, fc1_bias, fc2_weight, fc2_bias;

  bool inner() const { return x.defined() || fc1_weight.defined() || fc1_bias.defined(); }
};

// Of one expert: where a piece's go. Matrices; a bias has one row.
struct Place {
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias;

  static Place of(const Gradients& all, int64_t e, int64_t D, int64_t F) {
    const auto part = [e](const Tensor& stack, int64_t rows, int64_t columns) {
      return stack.defined() ? matrix(stack, e * rows, rows, columns) : Tensor();
    };
    return {part(all.fc1_weight, F, D), part(all.fc1_bias, 1, F), part(all.fc2_weight, D, F),
            part(all.fc2_bias, 1, D)};
  }
  Place like_it() const {
    const auto same = [](const Tensor& part) { return part.defined() ? room(part.sizes(), part) : Tensor(); };
    return {same(fc1_weight), same(fc1_bias), same(fc2_weight), same(fc2_bias)};
  }
  void add(const Place& other) {
    for (auto part : {&Place::fc1_weight, &Place::fc1_bias, &Place::fc2_weight, &Place::fc2_bias})
      if ((this->*part).defined()) (this->*part).add_(other.*part);
  }
  void clear() {
    for (auto* part : {&fc1_weight, &fc1_bias, &fc2_weight, &fc2_bias})
      if (part->defined()) part->zero_();
  }
};

// Room for the largest piece of a share: rows, and tiles of the gradients.
struct Buffers {
  Tensor x_nD, grad_y_nD, grad_hidden_nF, hidden_nF, weighted_nF, grad_y, grad_hidden, fc1_bias_F, fc2_bias_D;

  Buffers(const Call& call, int64_t most, at::ScalarType sums)
      : x_nD(room({most, call.D()}, call.x_SD)),
        grad_y_nD(room({most, call.D()}, call.x_SD)),
        grad_hidden_nF(room({most, call.F()}, call.x_SD)),
        hidden_nF(room({call.activation == RELU ? 0 : most, call.F()}, call.x_SD)),
        weighted_nF(room({call.weight_R ? most : 0, call.F()}, call.x_SD)),
        grad_y(room({padded(most), call.D()}, call.x_SD)),
        grad_hidden(room({padded(most), call.F()}, call.x_SD)),
        fc1_bias_F(at::detail::empty_cpu({call.F()}, sums)),
        fc2_bias_D(at::detail::empty_cpu({call.D()}, sums)) {}
};

// (M, N) = what the tiles, M wide, have as columns times the rows (n, N).
template <class T>
void multiply_turned(Tensor& to, Tensor& tiles, const T* left_nM, const T* right_nN, int64_t n) {
  const int64_t M = to.size(0), N = to.size(1);
  T* turned = tiles.mutable_data_ptr<T>();
  to_tiles<T>(turned, left_nM, nullptr, n, M);
  each_tile<T>(n, [&](int64_t first, int64_t rows) {
    multiply(to.mutable_data_ptr<T>(), N, turned + first * M, padded(rows), right_nN + first * N, N, M, N, rows,
             first > 0);
  });
}

template <class T>
struct Backward {
  using S = Sum<T>;
  const Call& call;
  const Tensor &inner_RF, &grad_y_SD;  // grad_y_SD in T
  Gradients& grads;

  const S* weight(const Piece& piece) const {
    return call.weight_R ? call.weight_R->const_data_ptr<S>() + piece.begin : nullptr;
  }

  // All of one piece; afterwards x_nD holds the gradients of its rows of x, where they are wanted.
  void piece(const Piece& piece, Buffers& room, Place& place) const {
    const int64_t n = piece.rows(), e = piece.expert, D = call.D(), F = call.F();
    const int64_t* source = call.source_R.const_data_ptr<int64_t>() + piece.begin;
    T *grad_y = room.grad_y_nD.mutable_data_ptr<T>(), *grad = room.grad_hidden_nF.mutable_data_ptr<T>();
    gather(grad_y, grad_y_SD.const_data_ptr<T>(), source, n, D);
    second_biases(piece, room, place);
    if (grads.inner() || grads.weight_R.defined())
      multiply(grad, F, grad_y, D, call.fc2_weight.const_data_ptr<T>() + e * D * F, F, n, F, D);
    auto grad_nF = matrix(room.grad_hidden_nF, 0, n, F);
    const auto inner_nF = matrix(inner_RF, piece.begin, n, F);
    auto hidden_nF = inner_nF;
    if (call.activation != RELU) {
      hidden_nF = matrix(room.hidden_nF, 0, n, F);
      activate(hidden_nF, inner_nF, call.activation);
      if (call.keep_RF) drop_rows(hidden_nF, piece);
    }
    weigh(piece, room, hidden_nF, grad_nF);
    if (place.fc2_weight.defined()) {
      const auto& weighted_nF = call.weight_R ? room.weighted_nF : hidden_nF;
      multiply_turned(place.fc2_weight, room.grad_y, grad_y, weighted_nF.const_data_ptr<T>(), n);
    }
    if (!grads.inner()) return;
    if (call.activation != RELU) {
      if (call.keep_RF) drop_rows(grad_nF, piece);
      activate_backward(grad_nF, inner_nF, call.activation);
    }
    if (place.fc1_bias.defined()) first_bias(piece, room, place);
    T* x = room.x_nD.mutable_data_ptr<T>();
    if (place.fc1_weight.defined()) {
      gather(x, call.x_SD.const_data_ptr<T>(), source, n, D);
      multiply_turned<T>(place.fc1_weight, room.grad_hidden, grad, x, n);
    }
    if (grads.x.defined())
      multiply<T>(x, D, grad, F, call.fc1_weight.const_data_ptr<T>() + e * F * D, D, n, D, F);
  }

  void drop_rows(Tensor& values_nF, const Piece& piece) const {
    const bool* keep = call.keep_RF->const_data_ptr<bool>() + piece.begin * call.F();
    drop(values_nF.mutable_data_ptr<T>(), keep, S(call.scale), values_nF.numel());
  }

  // The gradient of fc2's bias, and what the bias adds to that of the weights.
  void second_biases(const Piece& piece, Buffers& room, Place& place) const {
    const int64_t D = call.D();
    if (!place.fc2_bias.defined() && !grads.weight_R.defined()) return;
    S* sum = place.fc2_bias.defined() ? room.fc2_bias_D.mutable_data_ptr<S>() : nullptr;
    if (sum) std::fill_n(sum, D, S(0));
    const T* bias = call.fc2_bias.const_data_ptr<T>() + piece.expert * D;
    const T* grad = room.grad_y_nD.const_data_ptr<T>();
    const S* weight_n = weight(piece);
    S* to = grads.weight_R.defined() ? grads.weight_R.mutable_data_ptr<S>() + piece.begin : nullptr;
    for (int64_t r = 0; r < piece.rows(); ++r) {
      const S product = second_bias(sum, grad + r * D, bias, weight_n ? weight_n[r] : S(1), D);
      if (to) to[r] = product;
    }
    if (sum) convert(place.fc2_bias.mutable_data_ptr<T>(), sum, D);
  }

  // The weights' gradient; the hidden layer and its gradient times the weights: the weight goes to the narrow
  // side, y = W2 (weight * hidden) + weight * b2.
  void weigh(const Piece& piece, Buffers& room, const Tensor& hidden_nF, Tensor& grad_nF) const {
    const int64_t F = call.F();
    const bool relu = call.activation == RELU;
    const S* weight_n = weight(piece);
    const S scale_of_kept = relu ? S(call.scale) : S(1);
    const T* hidden = hidden_nF.const_data_ptr<T>();
    T* grad = grad_nF.mutable_data_ptr<T>();
    T* weighted = room.weighted_nF.mutable_data_ptr<T>();
    S* to = grads.weight_R.defined() ? grads.weight_R.mutable_data_ptr<S>() + piece.begin : nullptr;
    for (int64_t r = 0; r < piece.rows(); ++r, hidden += F, grad += F, weighted += F) {
      const S by = weight_n ? weight_n[r] : S(1);
      if (to) to[r] += dot(grad, hidden, F);
      if (weight_n && grads.fc2_weight.defined()) scale(weighted, hidden, by, F);
      if (!grads.inner()) continue;
      if (relu) {
        relu_backward(grad, hidden, by * scale_of_kept, F);
      } else if (weight_n) {
        scale(grad, grad, by, F);
      }
    }
  }

  void first_bias(const Piece& piece, Buffers& room, Place& place) const {
    const int64_t F = call.F();
    S* sum = room.fc1_bias_F.mutable_data_ptr<S>();
    std::fill_n(sum, F, S(0));
    const T* grad = room.grad_hidden_nF.const_data_ptr<T>();
    for (int64_t r = 0; r < piece.rows(); ++r) add(sum, grad + r * F, F);
    convert(place.fc1_bias.mutable_data_ptr<T>(), sum, F);
  }

  // carried: the gradients of the expert that the share before began, of this share's rows.
  void share(const Share& share, int64_t s, std::optional<Place>& carried) const {
    const int64_t D = call.D();
    Buffers room(call, share.most_rows, c10::CppTypeToScalarType<S>::value);
    S* grad_x = grads.x.defined() ? grads.x.mutable_data_ptr<S>() + s * grads.x.stride(0) : nullptr;
    if (grad_x) std::fill_n(grad_x, grads.x.stride(0), S(0));
    for (const auto& part : share.pieces) {
      Place place = Place::of(grads, part.expert, D, call.F());
      if (part.continues) place = *(carried = place.like_it());
      piece(part, room, place);
      const int64_t* source = call.source_R.const_data_ptr<int64_t>() + part.begin;
      const T* rows = room.x_nD.const_data_ptr<T>();
      for (int64_t r = 0; grad_x && r < part.rows(); ++r) add(grad_x + source[r] * D, rows + r * D, D);
    }
  }

  void all() const {
    const auto shares = shares_of(call.counts_E, 2 * call.D() * call.F());
    if (grads.x.defined())
      grads.x = at::detail::empty_cpu({int64_t(shares.size()), call.S(), call.D()},
                                      c10::CppTypeToScalarType<S>::value);
    std::vector<std::optional<Place>> carried(shares.size());
    in_threads(shares.size(), [&](int64_t s) { share(shares[s], s, carried[s]); });
    for (size_t s = 1; s < shares.size(); ++s)
      if (carried[s]) Place::of(grads, shares[s].pieces.front().expert, call.D(), call.F()).add(*carried[s]);
    const int64_t* counts = call.counts_E.const_data_ptr<int64_t>();
    for (int64_t e = 0; e < call.E(); ++e)
      if (!counts[e]) Place::of(grads, e, call.D(), call.F()).clear();
    if (grads.x.defined()) grads.x = added_up(grads.x, call.x_SD.scalar_type());
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_gradients(
    const Tensor& grad_y_SD, const Tensor& inner_RF, const Tensor& x_SD, const Tensor& source_R,
    const std::optional<Tensor>& weight_R, const Tensor& counts_E, const Tensor& fc1_weight,
    const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias, int64_t activation,
    const std::optional<Tensor>& keep_RF, double scale, std::array<bool, 6> wanted) {
  at::AutoDispatchBelowADInplaceOrView below;
  AloneInFork alone;
  Call call{x_SD, source_R, weight_R, counts_E, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
            Activation(activation), keep_RF, scale};
  call.check();
  TORCH_CHECK(grad_y_SD.sizes() == x_SD.sizes() && inner_RF.is_contiguous() &&
                  inner_RF.scalar_type() == x_SD.scalar_type() && inner_RF.numel() == call.R() * call.F(),
              "grad_y_SD or inner_RF is not of this call");
  const auto like = [](const Tensor& tensor, bool is_wanted) {
    return is_wanted ? room(tensor.sizes(), tensor) : Tensor();
  };
  Gradients grads{like(call.x_SD.slice(0, 0, 0), wanted[0]),
                  weight_R ? like(*weight_R, wanted[1]) : Tensor(),
                  like(fc1_weight, wanted[2]), like(fc1_bias, wanted[3]),
                  like(fc2_weight, wanted[4]), like(fc2_bias, wanted[5])};
  const auto grad_y = grad_y_SD.to(x_SD.scalar_type()).contiguous();
  XMOE_DISPATCH(x_SD.scalar_type(), [&] { Backward<scalar_t>{call, inner_RF, grad_y, grads}.all(); });
  return {grads.x, grads.weight_R, grads.fc1_weight, grads.fc1_bias, grads.fc2_weight, grads.fc2_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xmoe, m) {
  m.def(
      "expert_gradients(Tensor grad_y, Tensor inner, Tensor x, Tensor source, Tensor? weight, Tensor counts, "
      "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, int activation, Tensor? keep, "
      "float scale, bool[6] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(xmoe, CPU, m) { m.impl("expert_gradients", &expert_gradients); }

}  // namespace xmoe
