// Mutual information between a continuous code and a discrete factor, from the distances to nearest neighbours.

#pragma once

#include <cstdint>

namespace fastdis::host {

// Between each of d codes [d, n] and each of K factors [K, n], whose values are 0 to at most n - 1, in nats (B. C.
// Ross, PLoS ONE 2014). Never negative.
void neighbour_information(const double* codes, const int32_t* classes, int64_t n, int64_t d, int64_t K,
                           int64_t neighbours, int threads, double* information /* [d, K] */);

}  // namespace fastdis::host
