// Which experts each token takes, straight into order of expert; and the way back through softmax.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_softmax_backward_data_cpu_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "loops.h"
#include "shares.h"

namespace xmoe {

namespace {

using at::Tensor;

constexpr double UNIT = 0x1p-52;                                  // of moe/rules.py
constexpr int64_t BINS = 1024, TOKENS = BINS, TAKEN = BINS + 1;  // of moe/budget.py
// Experts, of which to compare all with all is quicker than to sort them; the part of them of which to look for
// one after the other is quicker still; comparisons worth a thread.
constexpr int64_t COMPARED = 512, FEW = 4, THREAD_WORK = 1 << 18;

template <class T> struct bits_of;
template <> struct bits_of<float> { using type = int32_t; };
template <> struct bits_of<double> { using type = int64_t; };

enum Rule : int64_t { MASS, PROBABILITY, RELATIVE };  // in the order of moe/rules.py

// A share's tokens: their choices, and how often each expert is among those that are taken.
struct Choices {
  std::vector<int32_t> expert_NK, taken_N;
  std::vector<int64_t> counts_E, histogram_C;
};

// A token's experts from the most probable to the least, of equals the lower id first: as many as are asked for.
template <class I>
class Preference {
 public:
  explicit Preference(int64_t E) : E(E), left_E(E), rank_E(E), expert_E(E) {}

  void start(const I* bits) {
    bits_E = bits;
    found = 0;
  }
  int32_t at(int64_t k) {
    while (k >= found) find();
    return expert_E[k];
  }

 private:
  const int64_t E;
  const I* bits_E = nullptr;
  int64_t found = 0;
  std::vector<I> left_E, rank_E;
  std::vector<int32_t> expert_E;

  void find() {
    if (found * FEW < E) {
      if (found == 0) std::copy_n(bits_E, E, left_E.data());
      expert_E[found] = take_largest(left_E.data(), I(E));
      ++found;
      return;
    }
    if (E > COMPARED) {
      std::iota(expert_E.begin(), expert_E.end(), 0);
      std::stable_sort(expert_E.begin(), expert_E.end(),
                       [&](int32_t a, int32_t b) { return bits_E[a] > bits_E[b]; });
    } else {
      ranks(rank_E.data(), bits_E, I(E));
      for (int64_t e = 0; e < E; ++e) expert_E[rank_E[e]] = e;
    }
    found = E;
  }
};

template <class T>
void choose(Choices& to, const T* probs_NE, int64_t N, int64_t E, Rule rule, double t, int64_t limit,
            bool count) {
  const T cut = T(t);
  using I = typename bits_of<T>::type;
  to.expert_NK.resize(N * limit);
  to.taken_N.resize(N);
  to.counts_E.assign(E, 0);
  to.histogram_C.assign(count ? BINS + 2 : 0, 0);
  Preference<I> experts(E);
  for (int64_t n = 0; n < N; ++n, probs_NE += E) {
    experts.start(reinterpret_cast<const I*>(probs_NE));
    int64_t taken = 0, units = 0;
    for (int64_t k = 0; k < limit; ++k) {
      const auto p = [&] { return probs_NE[experts.at(k)]; };  // the mass may need one less
      const T value = rule == MASS ? T(units) * T(UNIT) : rule == RELATIVE ? p() / probs_NE[experts.at(0)] : p();
      // A rounded sum may reach 1.
      const bool takes = k == 0 || (rule == MASS ? value < cut || t >= 1 : value >= cut);
      taken += takes;
      if (!takes && !count) break;
      if (count && k) {  // NaN: an overflow on its way to the loss scaler
        const T root = rule == PROBABILITY ? std::sqrt(std::sqrt(value)) : value;
        const T level = rule == MASS ? value : 1 - root;
        const T place = std::isnan(level) ? T(BINS) : level * BINS;
        ++to.histogram_C[std::clamp<int64_t>(int64_t(place), 0, BINS - 1)];
      }
      units += std::isnan(p()) ? int64_t(1 / UNIT) : int64_t(p() / T(UNIT));
    }
    to.taken_N[n] = taken;
    for (int64_t k = 0; k < taken; ++k) ++to.counts_E[to.expert_NK[n * limit + k] = experts.at(k)];
    if (count) to.histogram_C[TAKEN] += taken - 1;
  }
  if (count) to.histogram_C[TOKENS] += N;
}

Tensor numbers(int64_t size) { return Tensor(at::detail::empty_cpu({size}, at::kLong)); }

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_as(
    const Tensor& probs_TE, double cut, int64_t limit, const std::optional<Tensor>& histogram_C, Rule rule) {
  const int64_t tokens = probs_TE.size(0), E = probs_TE.size(1);
  const int64_t worth = tokens * E * E / THREAD_WORK;
  const int64_t shares = std::max<int64_t>(std::min({free_threads(), tokens, worth}), 1);
  const auto first = [&](int64_t share) { return tokens * share / shares; };
  const T* probs = probs_TE.const_data_ptr<T>();
  std::vector<Choices> choices(shares);
  in_threads(shares, [&](int64_t s) {
    choose(choices[s], probs + first(s) * E, first(s + 1) - first(s), E, rule, cut, limit,
           histogram_C.has_value());
  });
  auto counts_E = numbers(E);
  int64_t* counts = counts_E.mutable_data_ptr<int64_t>();
  int64_t R = 0;
  std::vector<std::vector<int64_t>> next(shares, std::vector<int64_t>(E));  // row of each share's next one
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = R;
    for (int64_t s = 0; s < shares; ++s) {
      next[s][e] = R;
      R += choices[s].counts_E[e];
    }
    counts[e] = R - begin;
  }
  auto token_R = numbers(R), expert_R = numbers(R), rank_R = numbers(R), first_T = numbers(tokens);
  auto weight_R = room({R}, probs_TE);
  auto *token = token_R.mutable_data_ptr<int64_t>(), *expert = expert_R.mutable_data_ptr<int64_t>(),
       *rank = rank_R.mutable_data_ptr<int64_t>(), *best = first_T.mutable_data_ptr<int64_t>();
  T* weight = weight_R.mutable_data_ptr<T>();
  in_threads(shares, [&](int64_t s) {
    for (int64_t t = first(s), n = 0; t < first(s + 1); ++t, ++n) {
      const int32_t* choice = choices[s].expert_NK.data() + n * limit;
      best[t] = choice[0];
      for (int64_t k = 0; k < choices[s].taken_N[n]; ++k) {
        const int64_t r = next[s][choice[k]]++;
        token[r] = t, expert[r] = choice[k], rank[r] = k, weight[r] = probs[t * E + choice[k]];
      }
    }
  });
  if (histogram_C) {
    int64_t* histogram = histogram_C->mutable_data_ptr<int64_t>();
    for (const auto& share : choices)
      for (int64_t c = 0; c < BINS + 2; ++c) histogram[c] += share.histogram_C[c];
  }
  return {token_R, expert_R, rank_R, weight_R, counts_E, first_T};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route(
    const Tensor& probs_TE, double cut, int64_t limit, const std::optional<Tensor>& histogram_C,
    int64_t rule) {
  at::AutoDispatchBelowADInplaceOrView below;
  AloneInFork alone;
  TORCH_CHECK(probs_TE.dim() == 2 && 1 <= limit && limit <= probs_TE.size(1),
              "probs must be (T, E) and limit in [1, E]");
  TORCH_CHECK(MASS <= rule && rule <= RELATIVE, "rule must be in [0, 2], got ", rule);
  TORCH_CHECK(!histogram_C || (histogram_C->scalar_type() == at::kLong && histogram_C->is_contiguous() &&
                               histogram_C->numel() == BINS + 2),
              "histogram must be int64, of ", BINS + 2);
  const auto probs = probs_TE.contiguous();
  return AT_DISPATCH_FLOATING_TYPES(probs.scalar_type(), "xmoe::route", [&] {
    return route_as<scalar_t>(probs, cut, limit, histogram_C, Rule(rule));
  });
}

// The gradient of the scores, of probs = softmax(scores) and of those that became weights.
Tensor route_backward(const std::optional<Tensor>& grad_probs_TE, const std::optional<Tensor>& grad_weight_R,
                      const Tensor& probs_TE, const Tensor& token_R, const Tensor& expert_R) {
  at::AutoDispatchBelowADInplaceOrView below;
  AloneInFork alone;
  const int64_t tokens = probs_TE.size(0), E = probs_TE.size(1), R = token_R.numel();
  TORCH_CHECK(probs_TE.is_contiguous() && expert_R.numel() == R &&
                  (!grad_weight_R || grad_weight_R->numel() == R),
              "these are not of one routing");
  auto grad_TE = room({tokens, E}, probs_TE);
  if (grad_probs_TE) {
    grad_TE.copy_(*grad_probs_TE);
  } else {
    grad_TE.zero_();
  }
  if (grad_weight_R) {
    AT_DISPATCH_FLOATING_TYPES(probs_TE.scalar_type(), "xmoe::route_backward", [&] {
      const auto weights = grad_weight_R->contiguous();
      auto* grad = grad_TE.mutable_data_ptr<scalar_t>();
      const auto* weight = weights.const_data_ptr<scalar_t>();
      const auto *token = token_R.const_data_ptr<int64_t>(), *expert = expert_R.const_data_ptr<int64_t>();
      for (int64_t r = 0; r < R; ++r) grad[token[r] * E + expert[r]] += weight[r];
    });
  }
  return at::cpu::_softmax_backward_data(grad_TE, probs_TE, 1, probs_TE.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xmoe, m) {
  m.def(
      "route(Tensor probs, float cut, int limit, Tensor(a!)? histogram, int rule) -> "
      "(Tensor token, Tensor expert, Tensor rank, Tensor weight, Tensor counts, Tensor first)");
  m.def("route_backward(Tensor? grad_probs, Tensor? grad_weight, Tensor probs, Tensor token, Tensor expert) "
        "-> Tensor");
}
TORCH_LIBRARY_IMPL(xmoe, CPU, m) {
  m.impl("route", &route);
  m.impl("route_backward", &route_backward);
}

}  // namespace xmoe
