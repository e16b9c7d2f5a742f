// Linear support vector machines on one code at a time: the classifiers behind the SAP score.

#pragma once

#include <cstdint>

namespace fastdis::host {

// How many lines K factors need together: one for each class, but one in all for a factor of two.
int64_t hinge_line_count(const int32_t* sizes, int64_t K);

// Fits, for every code j and factor k, one line for each class against the rest (one in all, of class 1 against 0,
// where there are two):
//
//     minimise over (w, b)   (w^2 + b^2) / 2 + sum_i C_i max(0, 1 - y_i (w codes[i, j] + b))^2
//
// to its very minimiser. C_i is `penalty` * n / (sizes[k] * count of the class) for the class, and plain `penalty` for
// the rest. Line l of code j, with l running over the classes of factor 0, then of factor 1, is
// slope[j, l] * (x - centre[j]) + height[j, l]. codes [n, d] by rows, n at least 1; classes [K, n] holds 0 to
// sizes[k] - 1, each at least once; centre [d], slope and height [d, lines]. Throws std::out_of_range where a class is
// none of these.
void hinge_lines(const double* codes, int64_t n, int64_t d, const int32_t* classes, int64_t K, const int32_t* sizes,
                 double penalty, double* centre, double* slope, double* height, int threads);

// accuracy[j, k]: the share of rows whose class is the one with the highest line of code j, the first of several (class
// 1 where the only line is above zero). A class outside 0 to sizes[k] - 1 is never met.
void hinge_accuracy(const double* codes, int64_t n, int64_t d, const int32_t* classes, int64_t K, const int32_t* sizes,
                    const double* centre, const double* slope, const double* height, double* accuracy, int threads);

}  // namespace fastdis::host
