// Which rows each thread computes, and small helpers for tensors inside threads.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace xmoe {

// One thread while it lives, in a fork of the process that loaded the library: OpenMP would wait for the
// threads that were there before, and are not in the fork.
struct AloneInFork {
  AloneInFork();
  ~AloneInFork();
  const int threads;
};

// That may be started here.
int64_t free_threads();

struct Piece {  // of one expert, rows in a row
  int64_t expert, begin, end;
  bool continues;  // has its first rows in the share before
  int64_t rows() const { return end - begin; }
};

struct Share {
  std::vector<Piece> pieces;
  int64_t most_rows = 0;  // of a piece
};

// Each thread's rows: as equal as they can be, cut between experts where that is about as good.
// work: multiply-adds of a row.
std::vector<Share> shares_of(const at::Tensor& counts_E, int64_t work);

// Runs `compute(share)` for 0, ..., shares - 1, a thread each, none of which starts further ones.
void in_threads(int64_t shares, const std::function<void(int64_t)>& compute);

// Runs `compute(begin, end)` for parts of 0, ..., size - 1 of at least `grain`.
void in_parts(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& compute);

inline at::Tensor room(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::Tensor(at::detail::empty_cpu(sizes, like.scalar_type()));
}

// Rows `first` on of a contiguous matrix or stack of them, (rows, columns), or transposed; no dispatch, which
// takes longer than a small product.
at::Tensor matrix(const at::Tensor& of, int64_t first, int64_t rows, int64_t columns,
                  bool transposed = false);

}  // namespace xmoe
