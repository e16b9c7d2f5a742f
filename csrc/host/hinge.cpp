// A squared hinge loss on one feature is a function of two parameters, quadratic in pieces. Its pieces differ in which
// points lie inside their margin, and on a line those are all points on one side of some place. With the points sorted
// once, and running sums of 1, u and u^2, a gradient and a Hessian cost three binary searches, whatever n.

#include "hinge.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../core/isa.h"
#include "../core/threads.h"

namespace fastdis::host {
namespace {

// Sums of 1, u and u^2 over some points.
struct Moments {
  double count = 0, first = 0, second = 0;

  Moments operator-(const Moments& other) const {
    return {count - other.count, first - other.first, second - other.second};
  }
};

struct Line {
  double slope = 0, height = 0;

  double operator()(double u) const { return slope * u + height; }
};

// Points in increasing order, and sums over any side of a place among them in the time of a binary search.
class SortedPoints {
 public:
  void assign(std::vector<double> points) {
    points_ = std::move(points);
    until_.assign(1, {});
    for (const double u : points_) {
      const Moments& last = until_.back();
      until_.push_back({last.count + 1, last.first + u, last.second + u * u});
    }
  }

  // Over the points where the line is below a bound.
  Moments below(const Line& line, double bound) const {
    const auto inside = [&](double u) { return line(u) < bound; };
    const auto outside = [&](double u) { return !(line(u) < bound); };
    return line.slope >= 0 ? until_[first_not(inside)] : until_.back() - until_[first_not(outside)];
  }

  // Over the points where the line is above a bound.
  Moments above(const Line& line, double bound) const { return below({-line.slope, -line.height}, -bound); }

 private:
  template <class Predicate>
  int64_t first_not(const Predicate& predicate) const {
    return std::partition_point(points_.begin(), points_.end(), predicate) - points_.begin();
  }

  std::vector<double> points_;
  std::vector<Moments> until_;  // over the first 0, 1, ... n points
};

// One line with `positive` above it and the rest of `all` below. Points are u = (x - centre) / scale, so that a large
// offset of x does not drown their spread in the running sums; the penalty stays that of the line as a function of x:
// with m = centre / scale and r = 1 / scale^2 it is (r slope^2 + (height - m slope)^2) / 2.
class Problem {
 public:
  Problem(const SortedPoints& all, const SortedPoints& positive, double positive_weight, double rest_weight, double m,
          double r)
      : all_(all), positive_(positive), positive_weight_(positive_weight), rest_weight_(rest_weight), m_(m), r_(r) {}

  // Newton's method with a line search. On a convex function of finitely many quadratic pieces it ends at the minimiser
  // itself, up to rounding.
  Line solve() const {
    Line at;
    State here = look(at);
    for (int iteration = 0; iteration < max_iterations; ++iteration) {
      const Line step = newton_step(here);
      const double descent = -along(here, step);
      if (!(descent > 0)) break;
      double length = 1;
      Line next = moved(at, step, length);
      State there = look(next);
      if (there.same_piece(here)) return next;
      // Too far where the function rises again, but for rounding; then halve the interval that holds the lowest place.
      double low = 0, high = 1;
      for (int halving = 0; halving < max_halvings; ++halving) {
        const double rise = along(there, step);
        if (rise > rounding * descent) {
          high = length;
        } else if (length < 1 && rise < -descent / 4) {
          low = length;
        } else {
          break;
        }
        length = (low + high) / 2;
        next = moved(at, step, length);
        there = look(next);
      }
      if (next.slope == at.slope && next.height == at.height) break;
      at = next;
      here = there;
    }
    return at;
  }

 private:
  static constexpr int max_iterations = 200, max_halvings = 60;
  static constexpr double rounding = 1e-8;

  // What is inside the margin, and the derivatives there.
  struct State {
    Moments positive, rest;
    bool rising;
    double slope, height;  // the gradient

    bool same_piece(const State& other) const {
      return positive.count == other.positive.count && rest.count == other.rest.count && rising == other.rising;
    }
  };

  State look(const Line& line) const {
    const Moments positive = positive_.below(line, 1);
    const Moments rest = all_.above(line, -1) - positive_.above(line, -1);
    const double through_origin = line.height - m_ * line.slope;  // the line at x = 0
    const auto pull = [&](const Moments& inside, double target, double weight, double& slope, double& height) {
      slope += 2 * weight * (line.slope * inside.second + (line.height - target) * inside.first);
      height += 2 * weight * (line.slope * inside.first + (line.height - target) * inside.count);
    };
    State state{positive, rest, line.slope >= 0, r_ * line.slope - m_ * through_origin, through_origin};
    pull(positive, 1, positive_weight_, state.slope, state.height);
    pull(rest, -1, rest_weight_, state.slope, state.height);
    return state;
  }

  Line newton_step(const State& state) const {
    const auto sum = [&](double of_positive, double of_rest) {
      return 2 * (positive_weight_ * of_positive + rest_weight_ * of_rest);
    };
    const double count = sum(state.positive.count, state.rest.count);
    const double first = sum(state.positive.first, state.rest.first);
    const double second = sum(state.positive.second, state.rest.second);
    // The determinant of the Hessian [[r + m^2 + second, first - m], [first - m, 1 + count]], summed so that m^2, which
    // may be far larger than all else, cancels before it is there.
    const double determinant = r_ * (1 + count) + std::max(second * count - first * first, 0.0) +
                               std::max(second + m_ * (2 * first + m_ * count), 0.0);
    const double across = first - m_;
    return {-((1 + count) * state.slope - across * state.height) / determinant,
            -((r_ + m_ * m_ + second) * state.height - across * state.slope) / determinant};
  }

  static double along(const State& state, const Line& step) {
    return state.slope * step.slope + state.height * step.height;
  }

  static Line moved(const Line& line, const Line& step, double length) {
    return {line.slope + length * step.slope, line.height + length * step.height};
  }

  const SortedPoints& all_;
  const SortedPoints& positive_;
  const double positive_weight_, rest_weight_, m_, r_;
};

// Gives each point to class `c` where its line is higher than the best line so far.
struct Contest {
  template <class Isa>
  static FASTDIS_INLINE void run(const double* points, double slope, double height, int64_t c, double* best,
                                 int64_t* chosen, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const double here = slope * points[i] + height;
      const bool higher = here > best[i];
      best[i] = higher ? here : best[i];
      chosen[i] = higher ? c : chosen[i];
    }
  }
};

}  // namespace

int64_t hinge_line_count(const int32_t* sizes, int64_t K) {
  int64_t lines = 0;
  for (int64_t k = 0; k < K; ++k) lines += sizes[k] == 2 ? 1 : sizes[k];
  return lines;
}

void hinge_lines(const double* codes, int64_t n, int64_t d, const int32_t* classes, int64_t K, const int32_t* sizes,
                 double penalty, double* centre, double* slope, double* height, int threads) {
  const int64_t lines = hinge_line_count(sizes, K);
  for (int64_t k = 0; k < K; ++k) {
    const auto is_class = [&](int32_t c) { return 0 <= c && c < sizes[k]; };
    if (!std::all_of(classes + k * n, classes + (k + 1) * n, is_class))
      throw std::out_of_range("classes must be from 0 to sizes - 1");
  }
  parallel_ranges(d, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<double, int64_t>> sorted(n);
    std::vector<double> points(n);
    SortedPoints all, positive;
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t i = 0; i < n; ++i) sorted[i] = {codes[i * d + j], i};
      std::sort(sorted.begin(), sorted.end());
      const double low = sorted[0].first, middle = sorted[n / 2].first, high = sorted[n - 1].first;
      // No smaller than the rounding of the codes, nor than what can be squared.
      const double scale = std::max({high - middle, middle - low, std::abs(middle) * 0x1p-53, 1e-100});
      for (int64_t i = 0; i < n; ++i) points[i] = (sorted[i].first - middle) / scale;
      all.assign(points);
      centre[j] = middle;

      int64_t line = j * lines;
      for (int64_t k = 0; k < K; ++k) {
        const int32_t size = sizes[k];
        std::vector<std::vector<double>> members(size);
        for (int64_t i = 0; i < n; ++i) members[classes[k * n + sorted[i].second]].push_back(points[i]);
        const auto balanced = [&](int32_t c) {
          return penalty * (static_cast<double>(n) / (static_cast<double>(size) * members[c].size()));
        };
        const double rest = size == 2 ? balanced(0) : penalty;
        for (int32_t c = size == 2 ? 1 : 0; c < size; ++c, ++line) {
          const double weight = balanced(c);
          positive.assign(std::move(members[c]));
          const Line best = Problem(all, positive, weight, rest, middle / scale, 1 / scale / scale).solve();
          slope[line] = best.slope / scale;
          height[line] = best.height;
        }
      }
    }
  });
}

void hinge_accuracy(const double* codes, int64_t n, int64_t d, const int32_t* classes, int64_t K, const int32_t* sizes,
                    const double* centre, const double* slope, const double* height, double* accuracy, int threads) {
  const int64_t lines = hinge_line_count(sizes, K);
  parallel_ranges(d, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<double> points(n), best(n);
    std::vector<int64_t> chosen(n);
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t i = 0; i < n; ++i) points[i] = codes[i * d + j] - centre[j];
      int64_t line = j * lines;
      for (int64_t k = 0; k < K; ++k) {
        const bool two = sizes[k] == 2;
        // What a line must exceed: zero where there is one only, and its predecessors where there are several.
        std::fill(best.begin(), best.end(), two ? 0.0 : -std::numeric_limits<double>::infinity());
        std::fill(chosen.begin(), chosen.end(), int64_t{0});
        for (int64_t c = two ? 1 : 0; c < sizes[k]; ++c, ++line)
          multiversion<Contest>(static_cast<const double*>(points.data()), slope[line], height[line], c, best.data(),
                                chosen.data(), n);
        int64_t right = 0;
        for (int64_t i = 0; i < n; ++i) right += chosen[i] == classes[k * n + i];
        accuracy[j * K + k] = static_cast<double>(right) / static_cast<double>(n);
      }
    }
  });
}

}  // namespace fastdis::host
