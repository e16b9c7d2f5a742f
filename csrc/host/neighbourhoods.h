// What manifold learning computes in the neighbourhood of every point.

#pragma once

#include <cstdint>
#include <vector>

namespace fastdis::host {

// columns[q] [count] = where the smallest of row rows[q] of values [*, n] are, smallest first, of equal ones the first
// first, and found[q] [count] = what they are. 1 <= count <= n; no value is NaN.
void smallest(const float* values, int64_t n, const int64_t* rows, int64_t m, int64_t count, int64_t* columns,
              float* found, int threads);

// out[q, c] = |queries[q] - points[candidates[q, c]]|^2, by differences: nothing cancels.
// points [n, D], queries [m, D], candidates [m, count] below n; sums in double precision.
template <class T>
void squared_distances(const T* points, int64_t n, int64_t D, const T* queries, int64_t m, const int64_t* candidates,
                       int64_t count, double* out, int threads);

// Where each point is a neighbour: of neighbours [m, k] laid out in a row, `points`, those at places[starts[p]] to
// places[starts[p + 1]] are p; places rise.
struct Occurrences {
  std::vector<int32_t> points;
  std::vector<uint32_t> places;
  std::vector<int64_t> starts;
};

// Throws std::out_of_range where a neighbour is not one of n points, or where they are too many to be numbered.
Occurrences occurrences(const int64_t* neighbours, int64_t m, int64_t k, int64_t n);

// grams[q] [k, k] = the products of all pairs of points[neighbours[q, a]] - mean, the mean being that of these k
// points. They come from squared distances between neighbours, so that an offset common to all points costs no digits.
template <class T>
void local_grams(const T* points, int64_t n, int64_t D, const int64_t* neighbours, int64_t m, int64_t k, double* grams,
                 int threads);

// Of every symmetric positive semidefinite grams[q] [k, k] the eigenvectors of the d largest eigenvalues, largest
// first, in vectors [m, k, d], and the d + 1 largest eigenvalues in values [m, d + 1]. settled[q] says whether they are
// exact to rounding; where eigenvalues d and d + 1 are almost equal the iteration may give up. d < k.
void leading_vectors(const double* grams, int64_t m, int64_t k, int64_t d, double* vectors, double* values,
                     bool* settled, int threads);

// bases[q] [k, d (d + 1) / 2], orthonormal: the products of all pairs of columns of vectors[q] [k, d], made orthogonal
// to 1, to these columns, and to each other. full[q] says whether they were independent.
void hessian_bases(const double* vectors, int64_t m, int64_t k, int64_t d, double* bases, bool* full, int threads);

// A sparse symmetric matrix by rows, columns in rising order.
struct SparseRows {
  std::vector<int64_t> starts;
  std::vector<int32_t> columns;
  std::vector<double> values;
};

// sum_q S_q^T P_q S_q [n, n], where S_q picks the k neighbours of q and P_q is the projector bases[q] bases[q]^T, or
// what that leaves of the identity. neighbours [m, k] below n, bases [m, k, r]. Sums run over q in rising order.
SparseRows alignment(const int64_t* neighbours, const double* bases, int64_t m, int64_t n, int64_t k, int64_t r,
                     bool complement, int threads);

}  // namespace fastdis::host
