#include "shares.h"

#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

namespace xmoe {

namespace {

// Multiply-adds below which a further thread costs more than it saves; rows that take as long as reading an
// expert's weights; and the part of a share by which it may be off if no expert is cut for it.
constexpr int64_t THREAD_WORK = 1 << 19, WEIGHTS_AS_ROWS = 8, SLACK = 16;
// Each share has a y of its own, and they are added up.
constexpr int64_t MOST_SHARES = 16;

const pid_t loaded_by = getpid();

// The row at which the next share begins if `row` were the exact place: the nearest start of an expert.
int64_t snap(int64_t row, const std::vector<int64_t>& start, int64_t slack) {
  auto after = std::lower_bound(start.begin(), start.end(), row);
  const int64_t above = after == start.end() ? start.back() : *after;
  const int64_t below = after == start.begin() ? 0 : *(after - 1);
  const int64_t nearest = above - row <= row - below ? above : below;
  return std::abs(nearest - row) <= slack ? nearest : row;
}

}  // namespace

AloneInFork::AloneInFork() : threads(getpid() == loaded_by ? 0 : at::get_num_threads()) {
  if (threads > 1) at::set_num_threads(1);
}
AloneInFork::~AloneInFork() {
  if (threads > 1) at::set_num_threads(threads);
}

std::vector<Share> shares_of(const at::Tensor& counts_E, int64_t work) {
  const int64_t E = counts_E.numel();
  const int64_t* counts = counts_E.const_data_ptr<int64_t>();
  std::vector<int64_t> start(E + 1, 0);
  int64_t busy = 0;
  for (int64_t e = 0; e < E; ++e) {
    start[e + 1] = start[e] + counts[e];
    busy += counts[e] > 0;
  }
  const int64_t R = start[E], worth = (R + busy * WEIGHTS_AS_ROWS) * work / THREAD_WORK;
  const int64_t num_shares = std::max<int64_t>(std::min({free_threads(), MOST_SHARES, R, worth}), 1);
  std::vector<Share> shares(num_shares);
  int64_t e = 0, row = 0;
  for (int64_t s = 0; s < num_shares; ++s) {
    const int64_t exact = R * (s + 1) / num_shares;
    const int64_t end = s + 1 == num_shares ? R : std::max(row, snap(exact, start, R / num_shares / SLACK));
    while (row < end) {
      while (start[e + 1] <= row) ++e;
      const Piece piece{e, row, std::min(end, start[e + 1]), row > start[e]};
      shares[s].pieces.push_back(piece);
      shares[s].most_rows = std::max(shares[s].most_rows, piece.rows());
      row = piece.end;
    }
  }
  return shares;
}

#ifdef XMOE_STD_THREADS  // ThreadSanitizer does not understand OpenMP's barriers: torch has one thread then
int64_t free_threads() { return 4; }
void in_threads(int64_t shares, const std::function<void(int64_t)>& compute) {
  std::vector<std::thread> threads;
  for (int64_t s = 0; s < shares; ++s) threads.emplace_back(compute, s);
  for (auto& thread : threads) thread.join();
}
void in_parts(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& compute) {
  const int64_t parts = (size + grain - 1) / grain;
  in_threads(parts, [&](int64_t p) { compute(p * grain, std::min(size, (p + 1) * grain)); });
}
#else
int64_t free_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }
void in_threads(int64_t shares, const std::function<void(int64_t)>& compute) {
  if (shares == 1) return compute(0);  // not in a parallel region: a product may use threads of its own
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) compute(s);
  });
}
void in_parts(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& compute) {
  at::parallel_for(0, size, grain, compute);
}
#endif

at::Tensor matrix(const at::Tensor& of, int64_t first, int64_t rows, int64_t columns, bool transposed) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(of.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), of.dtype());
  auto* impl = view.unsafeGetTensorImpl();
  const int64_t offset = of.storage_offset() + first * columns;
  if (transposed) {
    impl->set_sizes_and_strides(at::IntArrayRef{columns, rows}, at::IntArrayRef{1, columns}, offset);
  } else {
    impl->set_sizes_and_strides(at::IntArrayRef{rows, columns}, at::IntArrayRef{columns, 1}, offset);
  }
  return view;
}

namespace {

// (N, 4): share, expert, first row, end of each piece; for tests.
at::Tensor shares(const at::Tensor& counts_E, int64_t work) {
  std::vector<int64_t> rows;
  const auto all = shares_of(counts_E, work);
  for (size_t s = 0; s < all.size(); ++s)
    for (const auto& [expert, begin, end, continues] : all[s].pieces)
      rows.insert(rows.end(), {int64_t(s), expert, begin, end});
  at::Tensor pieces_N4 = at::detail::empty_cpu({int64_t(rows.size()) / 4, 4}, at::kLong);
  std::copy(rows.begin(), rows.end(), pieces_N4.mutable_data_ptr<int64_t>());
  return pieces_N4;
}

}  // namespace

TORCH_LIBRARY(xmoe, m) { m.def("shares(Tensor counts, int work) -> Tensor"); }
TORCH_LIBRARY_IMPL(xmoe, CPU, m) { m.impl("shares", &shares); }

}  // namespace xmoe
