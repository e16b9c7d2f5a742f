// One pass over the rows, a block at a time: scores, softmax and gradient of a block stay in cache, where library calls
// write and read [n, classes] for each.

#include "logistic.h"

#include <algorithm>
#include <cmath>

#include "../core/gemm.h"
#include "../core/scalar.h"
#include "../core/threads.h"

namespace fastdis::host {

namespace {

constexpr int64_t block = 32;  // rows

struct Problem {
  const double* x;
  const int32_t* y;
  const double* w;
  const double* W;  // [padded_classes, features]
  int64_t features, padded_features, classes, padded_classes;
};

struct Loss {
  // Adds rows [begin, end) to gradient [padded_classes, padded_features] and to the loss.
  template <class Isa>
  static FASTDIS_INLINE void run(const Problem* problem, int64_t begin, int64_t end, double* scratch, double* gradient,
                                 double* loss) {
    const Problem p = *problem;
    double* columns = scratch;                      // [features, block]
    double* scores = columns + p.features * block;  // [padded_classes, block]
    double peak[block], total[block], scale[block];
    for (int64_t row = begin; row < end; row += block) {
      const int64_t rows = std::min(block, end - row);
      for (int64_t j = 0; j < p.features; ++j) {
        for (int64_t r = 0; r < block; ++r) {
          columns[j * block + r] = r < rows ? p.x[(row + r) * p.padded_features + j] : 0.0;
        }
      }
      multiply<Isa, double>(p.padded_classes, block, p.features, p.W, p.features, 1, columns, block, scores, block,
                            false);
      for (int64_t r = 0; r < block; ++r) {
        peak[r] = scores[r];
        total[r] = 0;
      }
      for (int64_t c = 1; c < p.classes; ++c) {
#pragma omp simd
        for (int64_t r = 0; r < block; ++r) peak[r] = scores[c * block + r] > peak[r] ? scores[c * block + r] : peak[r];
      }
      for (int64_t r = 0; r < rows; ++r) *loss -= p.w[row + r] * (scores[p.y[row + r] * block + r] - peak[r]);
      for (int64_t c = 0; c < p.classes; ++c) {
#pragma omp simd
        for (int64_t r = 0; r < block; ++r) {
          scores[c * block + r] = exponential(scores[c * block + r] - peak[r]);
          total[r] += scores[c * block + r];
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        *loss += p.w[row + r] * std::log(total[r]);
        scale[r] = p.w[row + r] / total[r];
      }
      for (int64_t r = rows; r < block; ++r) scale[r] = 0;
      for (int64_t c = 0; c < p.classes; ++c) {
#pragma omp simd
        for (int64_t r = 0; r < block; ++r) scores[c * block + r] *= scale[r];
      }
      for (int64_t r = 0; r < rows; ++r) scores[p.y[row + r] * block + r] -= p.w[row + r];
      multiply<Isa, double>(p.padded_classes, p.padded_features, rows, scores, block, 1, p.x + row * p.padded_features,
                            p.padded_features, gradient, p.padded_features, true);
    }
  }
};

}  // namespace

double multinomial_loss(const double* x, const int32_t* y, const double* w, const double* W, int64_t n,
                        int64_t features, int64_t padded_features, int64_t classes, int threads, double* gradient) {
  const int64_t padded_classes = padded(classes, row_pad);
  Buffer<double> weights(padded_classes * features);
  std::copy(W, W + classes * features, weights.begin());
  const Problem problem{x, y, w, weights.data(), features, padded_features, classes, padded_classes};

  // As many pieces whatever the number of threads, added up in their order: the sum does not depend on who made them.
  const int64_t rows = std::max<int64_t>(16 * block, padded((n + 63) / 64, block));
  const int64_t pieces = (n + rows - 1) / rows;
  const int64_t size = padded_classes * padded_features;
  Buffer<double> gradients(pieces * size), losses(pieces);
  parallel_ranges(pieces, 1, threads, [&](int64_t begin, int64_t end) {
    Buffer<double> scratch((features + padded_classes) * block);
    for (int64_t piece = begin; piece < end; ++piece) {
      multiversion<Loss>(&problem, piece * rows, std::min(n, (piece + 1) * rows), scratch.data(),
                         gradients.data() + piece * size, losses.data() + piece);
    }
  });
  double loss = 0;
  std::fill(gradient, gradient + classes * features, 0.0);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    loss += losses[piece];
    for (int64_t c = 0; c < classes; ++c) {
      const double* from = gradients.data() + piece * size + c * padded_features;
      for (int64_t j = 0; j < features; ++j) gradient[c * features + j] += from[j];
    }
  }
  return loss;
}

}  // namespace fastdis::host
