// One pass over the rows, a block at a time: scores, softmax and gradient of a block stay in cache, where library calls
// write and read [n, classes] for each. Scores want rows side by side and the gradient wants features side by side, so
// x is kept both ways.

#include "logistic.h"

#include <algorithm>
#include <stdexcept>

#include "../core/gemm.h"
#include "../core/scalar.h"
#include "../core/threads.h"

namespace fastdis::host {

namespace {

constexpr int64_t block = 32;  // rows

struct Problem {
  const double* x;  // [features, rows]
  const int32_t* y;
  const double* w;
  const double* W;  // [padded_classes, features]
  int64_t rows, features, classes, padded_classes;
};

struct Loss {
  // Writes the loss of rows [begin, end), whole blocks, and its gradient [features, classes]: sums over rows by the
  // lane of a vector they fall into, which are added up last. scores is [padded_classes, block].
  template <class Isa, class Real = double>  // a name that vector types can depend on
  static FASTDIS_INLINE void run(const Problem* problem, int64_t begin, int64_t end, double* scores, double* lane_sums,
                                 double* gradient, double* loss) {
    typedef Real Vector __attribute__((vector_size(Isa::vector_bytes), aligned(alignof(Real)), may_alias));
    constexpr int64_t lanes = Isa::vector_bytes / sizeof(Real), vectors = block / lanes;
    const Problem p = *problem;
    const int64_t size = p.features * p.classes;
    Vector* sums = reinterpret_cast<Vector*>(lane_sums);
    for (int64_t i = 0; i < size; ++i) sums[i] = Vector{};
    double peak[block], total[block], share[block];
    double sum = 0;
    for (int64_t row = begin; row < end; row += block) {
      const int32_t* y = p.y + row;
      const double* w = p.w + row;
      multiply<Isa, double>(p.padded_classes, block, p.features, p.W, p.features, 1, p.x + row, p.rows, scores, block,
                            false);
      for (int64_t r = 0; r < block; ++r) {
        peak[r] = scores[r];
        total[r] = 0;
      }
      for (int64_t c = 1; c < p.classes; ++c) {
#pragma omp simd
        for (int64_t r = 0; r < block; ++r) peak[r] = scores[c * block + r] > peak[r] ? scores[c * block + r] : peak[r];
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t r = 0; r < block; ++r) sum -= w[r] * (scores[y[r] * block + r] - peak[r]);
      for (int64_t c = 0; c < p.classes; ++c) {
#pragma omp simd
        for (int64_t r = 0; r < block; ++r) {
          scores[c * block + r] = exponential(scores[c * block + r] - peak[r]);
          total[r] += scores[c * block + r];
        }
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t r = 0; r < block; ++r) {
        sum += w[r] * logarithm(total[r]);
        share[r] = w[r] / total[r];
      }
      for (int64_t c = 0; c < p.classes; ++c) {
#pragma omp simd
        for (int64_t r = 0; r < block; ++r) scores[c * block + r] *= share[r];
      }
      for (int64_t r = 0; r < block; ++r) scores[y[r] * block + r] -= w[r];
      for (int64_t j = 0; j < p.features; ++j) {
        const Vector* x = reinterpret_cast<const Vector*>(p.x + j * p.rows + row);
        for (int64_t c = 0; c < p.classes; ++c) {
          const Vector* share_of = reinterpret_cast<const Vector*>(scores + c * block);
          Vector total_of = sums[j * p.classes + c];
          for (int64_t v = 0; v < vectors; ++v) total_of += share_of[v] * x[v];
          sums[j * p.classes + c] = total_of;
        }
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      gradient[i] = 0;
      for (int64_t lane = 0; lane < lanes; ++lane) gradient[i] += sums[i][lane];
    }
    *loss = sum;
  }
};

}  // namespace

MultinomialLoss::MultinomialLoss(const double* x, const int32_t* y, const double* w, int64_t n, int64_t features,
                                 int64_t classes)
    : features_(features), classes_(classes), y_(y, y + n), w_(w, w + n) {
  for (const int32_t label : y_)
    if (label < 0 || label >= classes) throw std::out_of_range("y must be from 0 to classes - 1");
  rows_ = padded(n, block);
  x_.assign(features * rows_, 0.0);
  y_.resize(rows_, 0);
  w_.resize(rows_, 0.0);  // rows beyond n weigh nothing
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < features; ++j) x_[j * rows_ + i] = x[i * features + j];
  }
}

double MultinomialLoss::operator()(const double* W, int threads, double* gradient) const {
  const int64_t features = features_, classes = classes_, padded_classes = padded(classes, row_pad);
  Buffer<double> weights(padded_classes * features);
  std::copy(W, W + classes * features, weights.begin());
  const Problem problem{x_.data(), y_.data(), w_.data(), weights.data(), rows_, features, classes, padded_classes};

  // As many pieces whatever the number of threads, added up in their order: the sum does not depend on who made them.
  const int64_t piece_rows = std::max<int64_t>(16 * block, padded(rows_ / 64, block));
  const int64_t pieces = (rows_ + piece_rows - 1) / piece_rows, size = features * classes;
  Buffer<double> gradients(pieces * size), losses(pieces);
  parallel_ranges(pieces, 1, threads, [&](int64_t begin, int64_t end) {
    Buffer<double> scores(padded_classes * block), lane_sums(size * column_pad<double>);
    for (int64_t piece = begin; piece < end; ++piece) {
      multiversion<Loss>(&problem, piece * piece_rows, std::min(rows_, (piece + 1) * piece_rows), scores.data(),
                         lane_sums.data(), gradients.data() + piece * size, losses.data() + piece);
    }
  });
  double loss = 0;
  std::fill(gradient, gradient + size, 0.0);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    loss += losses[piece];
    for (int64_t j = 0; j < features; ++j) {
      for (int64_t c = 0; c < classes; ++c) gradient[c * features + j] += gradients[piece * size + j * classes + c];
    }
  }
  return loss;
}

}  // namespace fastdis::host
