// Joint histograms of codes and factors: what every metric made of mutual information starts from.

#pragma once

#include <cstdint>

namespace fastdis::host {

// bins[j, i], from 0 to `count` - 1: how many of the edges 1 to `count` - 1 of code j are not above codes[j, i].
// codes and bins [d, n], edges [d, count + 1]. Edges rise; the first and the last bound nothing, so that every value
// has a bin. An infinite edge is never reached.
void discretize(const double* codes, int64_t d, int64_t n, const double* edges, int64_t count, int32_t* bins,
                int threads);

// counts[j, offset of k + b, a]: the rows where columns[k] is b and rows[j] is a. rows [d, n] holds 0 to `limit` - 1,
// columns [K, n] holds 0 to sizes[k] - 1, counts [d, sum of sizes, limit] is overwritten; offset of k is the sum of the
// sizes before k. Throws std::out_of_range where a value is none of these.
void joint_histogram(const int32_t* rows, int64_t d, int32_t limit, const int32_t* columns, int64_t K,
                     const int32_t* sizes, int64_t n, int64_t* counts, int threads);

// The same where a code is not a number but a Gaussian, mean[j, i] and std[j, i] >= 0: each row adds to every bin the
// probability that it gives it. The first and the last bin take the tails. mean and std [d, n], edges [d, limit + 1],
// mass [d, sum of sizes, limit].
void gaussian_histogram(const double* mean, const double* std, int64_t d, int64_t n, const double* edges, int32_t limit,
                        const int32_t* columns, int64_t K, const int32_t* sizes, double* mass, int threads);

}  // namespace fastdis::host
