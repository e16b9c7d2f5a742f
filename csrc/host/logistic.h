// The loss that multinomial logistic regression minimises.

#pragma once

#include <cstdint>
#include <vector>

#include "../core/gemm.h"

namespace fastdis::host {

// sum_i w_i (log sum_c exp(W_c . x_i) - W_{y_i} . x_i) as a function of W [classes, features], for x [n, features],
// y [n] and w [n], which it copies. Throws std::out_of_range where y is not from 0 to classes - 1.
class MultinomialLoss {
 public:
  MultinomialLoss(const double* x, const int32_t* y, const double* w, int64_t n, int64_t features, int64_t classes);

  // Returns the loss at W, and writes its gradient in W; the same on any number of threads.
  double operator()(const double* W, int threads, double* gradient) const;

  int64_t features() const { return features_; }
  int64_t classes() const { return classes_; }

 private:
  int64_t rows_;  // n and some that weigh nothing
  int64_t features_, classes_;
  Buffer<double> x_;  // [features, rows]
  std::vector<int32_t> y_;
  std::vector<double> w_;
};

}  // namespace fastdis::host
