// The loss that multinomial logistic regression minimises.

#pragma once

#include <cstdint>

namespace fastdis::host {

// Returns sum_i w_i (log sum_c exp(W_c . x_i) - W_{y_i} . x_i), and writes its gradient in W.
// x [n, padded_features]: `padded_features` is a multiple of 8, and columns from `features` on are 0; y [n]; w [n];
// W and gradient [classes, features].
double multinomial_loss(const double* x, const int32_t* y, const double* w, const double* W, int64_t n,
                        int64_t features, int64_t padded_features, int64_t classes, int threads, double* gradient);

}  // namespace fastdis::host
