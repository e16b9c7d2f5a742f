// Style modulation on the CPU: y = act(gamma * x_hat + beta), gamma = weight * scale, beta = bias * scale + shift.
//
// The unit of work is a block of channels of one sample, small enough to stay in cache between the passes over it: so
// memory sees x read once and y written once (backward: x and dy read once, dx written once). Each pass is a
// multiversioned kernel over channels of a block, in either layout:
//   channels first  block[c][s]   a channel is one contiguous plane
//   channels last   block[s][c]   a position is one contiguous run of channels, `pitch` apart
// float16 and bfloat16 blocks are widened into a float32 block first, so that the passes exist for float32 and float64.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>

#include "../core/gemm.h"
#include "../core/image.h"
#include "../core/tensor.h"

namespace fastdis {
namespace {

// "none" is leaky_relu with a slope of one.
enum class Activation { relu, leaky_relu, silu };

template <Activation activation, class A>
FASTDIS_INLINE A activate(A t, A negative_slope) {
  if constexpr (activation == Activation::relu) return t < A(0) ? A(0) : t;
  if constexpr (activation == Activation::leaky_relu) return t > A(0) ? t : t * negative_slope;
  return t * logistic(t);
}

template <Activation activation, class A>
FASTDIS_INLINE A activation_gradient(A t, A dy, A negative_slope) {
  if constexpr (activation == Activation::relu) return t <= A(0) ? A(0) : dy;
  if constexpr (activation == Activation::leaky_relu) return t > A(0) ? dy : dy * negative_slope;
  const A sigmoid = logistic(t);
  return dy * sigmoid * (A(1) + t * (A(1) - sigmoid));
}

// The channels of a block that one call of a pass covers.
struct Range {
  int64_t begin, end, pitch, positions;
};

// What each channel of a block needs: x_hat = (x - mean) * rstd, t = gamma * x_hat + beta.
template <class A>
struct Channels {
  const A *mean, *rstd, *gamma, *beta;
};

// Channels of a channels-last block whose sums are taken together, so that the accumulators stay in registers.
constexpr int64_t strip = 32;

// Terms that are added one after the other before their sum joins the others: bounds the rounding of long float32 sums.
constexpr int64_t plane_run = 8192, column_run = 128;

// Channels-first statistics: sums[c] = sum over positions of x, or of (x - mean[c])^2 where `squares`.
template <class A, bool squares>
struct PlaneSums {
  template <class Isa>
  static FASTDIS_INLINE void run(const A* x, Range range, const A* mean, A* sums) {
    const int64_t S = range.positions;
    for (int64_t c = range.begin; c < range.end; ++c) {
      A sum = 0;
      for (int64_t first = 0; first < S; first += plane_run) {
        sum += of_run<Isa>(x + c * S + first, std::min(plane_run, S - first), squares ? mean[c] : A(0));
      }
      sums[c] = sum;
    }
  }

  // In vectors, because a reduction by the compiler adds the lanes up one after the other: for a small plane that takes
  // longer than the plane itself.
  template <class Isa>
  static FASTDIS_INLINE A of_run(const A* x, int64_t n, A center) {
    typedef A Vector __attribute__((vector_size(Isa::vector_bytes), aligned(alignof(A)), may_alias));
    constexpr int64_t lanes = Isa::vector_bytes / sizeof(A);
    const auto term = [&](int64_t i) FASTDIS_INLINE_LAMBDA {
      const Vector value = *reinterpret_cast<const Vector*>(x + i) - center;
      return squares ? value * value : value;
    };
    Vector sum = {};
    int64_t i = 0;
    for (; i + 4 * lanes <= n; i += 4 * lanes) {  // four terms to an addition that the next one waits for
      sum += (term(i) + term(i + lanes)) + (term(i + 2 * lanes) + term(i + 3 * lanes));
    }
    for (; i + lanes <= n; i += lanes) sum += term(i);
    A total = sum_of_lanes<A>(sum, std::make_integer_sequence<int, lanes>{});
    for (; i < n; ++i) {
      const A value = x[i] - center;
      total += squares ? value * value : value;
    }
    return total;
  }
};

// Channels-last statistics in one read of memory: the mean of each channel, and squares[c] = sum of (x - mean[c])^2.
// Runs of positions are summed twice while they are in cache, and joined by Chan's formula.
template <class A>
struct ColumnMoments {
  template <class Isa>
  static FASTDIS_INLINE void run(const A* x, Range range, A* mean, A* squares) {
    const int64_t S = range.positions;
    for (int64_t first = 0; first < S; first += column_run) {
      const int64_t rows = std::min(column_run, S - first);
      const A share = A(1) / static_cast<A>(rows), joined = static_cast<A>(rows) / static_cast<A>(first + rows);
      const A weight = static_cast<A>(first) * joined;
      for (int64_t c0 = range.begin; c0 < range.end; c0 += strip) {
        const A* corner = x + first * range.pitch + c0;
        const auto join = [&](int64_t n) FASTDIS_INLINE_LAMBDA {
          A part[strip] = {}, center[strip] = {}, square[strip] = {};
          for (int64_t s = 0; s < rows; ++s) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) part[j] += corner[s * range.pitch + j];
          }
          for (int64_t j = 0; j < n; ++j) center[j] = part[j] * share;
          for (int64_t s = 0; s < rows; ++s) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
              const A value = corner[s * range.pitch + j] - center[j];
              square[j] += value * value;
            }
          }
          for (int64_t j = 0; j < n; ++j) {
            const A step = first == 0 ? A(0) : center[j] - mean[c0 + j];
            mean[c0 + j] = first == 0 ? center[j] : mean[c0 + j] + step * joined;
            squares[c0 + j] = (first == 0 ? A(0) : squares[c0 + j]) + square[j] + step * step * weight;
          }
        };
        const int64_t width = std::min(strip, range.end - c0);
        width == strip ? join(strip) : join(width);
      }
    }
  }
};

// y = act((x - mean) * rstd * gamma + beta); y may be x.
template <class A, Layout layout, Activation activation>
struct Apply {
  template <class Isa>
  static FASTDIS_INLINE void run(const A* x, A* y, Range range, Channels<A> channels, A negative_slope) {
    const int64_t S = range.positions;
    const auto [mean, rstd, gamma, beta] = channels;
    if constexpr (layout == Layout::channels_first) {
      for (int64_t c = range.begin; c < range.end; ++c) {
        const A center = mean[c], slope = rstd[c] * gamma[c], offset = beta[c];
        const A* from = x + c * S;
        A* to = y + c * S;
#pragma omp simd
        for (int64_t i = 0; i < S; ++i)
          to[i] = activate<activation>((from[i] - center) * slope + offset, negative_slope);
      }
    } else {
      // Backwards: the last rows that the statistics read are the ones still in cache.
      for (int64_t s = S; s-- > 0;) {
        const A* from = x + s * range.pitch;
        A* to = y + s * range.pitch;
#pragma omp simd
        for (int64_t c = range.begin; c < range.end; ++c) {
          to[c] = activate<activation>((from[c] - mean[c]) * (rstd[c] * gamma[c]) + beta[c], negative_slope);
        }
      }
    }
  }
};

// dgamma[c] = sum dt x_hat, dbeta[c] = sum dt, with dt = act'(t) dy. Without normalisation this pass also finishes
// dx = gamma dt. With it, and where sigmoids are dear, dx holds dt until the second pass. dx may be dy.
template <class A, Layout layout, Activation activation, bool normalised>
struct BackwardSums {
  static constexpr bool keeps_dt = normalised && activation == Activation::silu;

  template <class Isa>
  static FASTDIS_INLINE void run(const A* dy, const A* x, A* dx, Range range, Channels<A> channels, A* dgamma, A* dbeta,
                                 A negative_slope) {
    const int64_t S = range.positions;
    const auto [mean, rstd, gamma, beta] = channels;
    const auto step = [=](int64_t i, A center, A slope, A offset, A& sum_gamma, A& sum_beta) FASTDIS_INLINE_LAMBDA {
      const A centred = x[i] - center;
      const A dt = activation_gradient<activation>(centred * slope + offset, dy[i], negative_slope);
      if constexpr (!normalised) dx[i] = slope * dt;
      if constexpr (keeps_dt) dx[i] = dt;
      sum_gamma += dt * centred;
      sum_beta += dt;
    };
    if constexpr (layout == Layout::channels_first) {
      for (int64_t c = range.begin; c < range.end; ++c) {
        const A center = mean[c], slope = rstd[c] * gamma[c], offset = beta[c];
        A sum_gamma = 0, sum_beta = 0;
        for (int64_t first = c * S; first < (c + 1) * S; first += plane_run) {
          const int64_t count = std::min(plane_run, (c + 1) * S - first), half = count / 2;
          A gamma0 = 0, gamma1 = 0, beta0 = 0, beta1 = 0;
#pragma omp simd reduction(+ : gamma0, gamma1, beta0, beta1)
          for (int64_t i = first; i < first + half; ++i) {
            step(i, center, slope, offset, gamma0, beta0);
            step(i + half, center, slope, offset, gamma1, beta1);
          }
          if (count % 2 != 0) step(first + count - 1, center, slope, offset, gamma0, beta0);
          sum_gamma += gamma0 + gamma1;
          sum_beta += beta0 + beta1;
        }
        dgamma[c] = sum_gamma * rstd[c];
        dbeta[c] = sum_beta;
      }
    } else {
      for (int64_t first = 0; first < S; first += column_run) {
        const int64_t last = std::min(first + column_run, S);
        for (int64_t c0 = range.begin; c0 < range.end; c0 += strip) {
          const auto add_up = [&](int64_t n) FASTDIS_INLINE_LAMBDA {
            A center[strip], slope[strip], offset[strip], sum_gamma[strip] = {}, sum_beta[strip] = {};
            for (int64_t j = 0; j < n; ++j) {
              center[j] = mean[c0 + j];
              slope[j] = rstd[c0 + j] * gamma[c0 + j];
              offset[j] = beta[c0 + j];
            }
            for (int64_t s = first; s < last; ++s) {
              const int64_t at = s * range.pitch + c0;
#pragma omp simd
              for (int64_t j = 0; j < n; ++j) {
                step(at + j, center[j], slope[j], offset[j], sum_gamma[j], sum_beta[j]);
              }
            }
            for (int64_t j = 0; j < n; ++j) {
              dgamma[c0 + j] = (first == 0 ? A(0) : dgamma[c0 + j]) + sum_gamma[j] * rstd[c0 + j];
              dbeta[c0 + j] = (first == 0 ? A(0) : dbeta[c0 + j]) + sum_beta[j];
            }
          };
          const int64_t width = std::min(strip, range.end - c0);
          width == strip ? add_up(strip) : add_up(width);
        }
      }
    }
  }
};

// dx = slope * dt - offset - (x - mean) * tilt, with dt found again unless BackwardSums kept it. dx may be dy.
template <class A, Layout layout, Activation activation>
struct BackwardApply {
  template <class Isa>
  static FASTDIS_INLINE void run(const A* dy, const A* x, A* dx, Range range, Channels<A> channels, const A* offsets,
                                 const A* tilts, A negative_slope) {
    const int64_t S = range.positions;
    const auto [mean, rstd, gamma, beta] = channels;
    const auto step = [=](int64_t i, A center, A slope, A shift, A offset, A tilt) FASTDIS_INLINE_LAMBDA {
      const A centred = x[i] - center;
      A dt;
      if constexpr (BackwardSums<A, layout, activation, true>::keeps_dt) {
        dt = dx[i];
      } else {
        dt = activation_gradient<activation>(centred * slope + shift, dy[i], negative_slope);
      }
      dx[i] = slope * dt - offset - centred * tilt;
    };
    if constexpr (layout == Layout::channels_first) {
      for (int64_t c = range.begin; c < range.end; ++c) {
        const A center = mean[c], slope = rstd[c] * gamma[c], shift = beta[c], offset = offsets[c], tilt = tilts[c];
#pragma omp simd
        for (int64_t i = c * S; i < (c + 1) * S; ++i) step(i, center, slope, shift, offset, tilt);
      }
    } else {
      for (int64_t s = S; s-- > 0;) {
        const int64_t at = s * range.pitch;
#pragma omp simd
        for (int64_t c = range.begin; c < range.end; ++c) {
          step(at + c, mean[c], rstd[c] * gamma[c], beta[c], offsets[c], tilts[c]);
        }
      }
    }
  }
};

// One block copied between an image in its own dtype and a compact block in the accumulation dtype.
template <class From, class To, Layout layout>
struct Convert {
  template <class Isa>
  static FASTDIS_INLINE void run(const From* from, int64_t from_pitch, To* to, int64_t to_pitch, Range range) {
    const int64_t S = range.positions;
    if constexpr (layout == Layout::channels_first) {
#pragma omp simd
      for (int64_t i = range.begin * S; i < range.end * S; ++i) store(to, i, load(from, i));
    } else {
      for (int64_t s = 0; s < S; ++s) {
        const From* source = from + s * from_pitch;
        To* target = to + s * to_pitch;
#pragma omp simd
        for (int64_t c = range.begin; c < range.end; ++c) store(target, c, load(source, c));
      }
    }
  }
};

// The work on one batch of images, in units of whole groups (single channels where there are none).
struct Plan {
  int64_t batch, channels, positions, groups;
  Layout layout;
  int64_t group_channels;  // 1 where there are no groups
  int64_t unit_channels;
  bool split;  // too few units for the threads: the channels of each unit are spread over them instead

  Plan(const Image& image, int64_t groups_)
      : batch(image.batch),
        channels(image.channels),
        positions(image.positions),
        groups(groups_),
        layout(positions == 1 ? Layout::channels_last : image.layout),  // the same memory, and runs worth vectorising
        group_channels(groups > 0 ? channels / groups : 1) {
    const int64_t wanted = layout == Layout::channels_last ? channels_last_unit : 1;
    unit_channels = std::max(group_channels, std::min(channels, wanted) / group_channels * group_channels);
    split = !serial() && batch * units_per_sample() < static_cast<int64_t>(torch::stable::get_num_threads());
  }

  // unit(sample, begin, end) for each unit, over threads unless the units themselves are split.
  template <class Unit>
  void for_each_unit(const Unit& unit) const {
    const int64_t per_sample = units_per_sample(), units = batch * per_sample;
    const auto run = [&](int64_t first, int64_t last) {
      for (int64_t u = first; u < last; ++u) {
        const int64_t begin = u % per_sample * unit_channels;
        unit(u / per_sample, begin, std::min(begin + unit_channels, channels));
      }
    };
    if (split || serial()) return run(0, units);
    torch::stable::parallel_for(0, units, std::max<int64_t>(1, serial_elements / 2 / (unit_channels * positions)), run);
  }

  // pass(range) over the channels of a block: in one piece, or over threads where units are split.
  template <class Pass>
  void for_range(int64_t width, int64_t pitch, const Pass& pass) const {
    const auto run = [&](int64_t first, int64_t last) { pass(Range{first, last, pitch, positions}); };
    if (!split) return run(0, width);
    torch::stable::parallel_for(0, width, 1, run);
  }

  // finish(first channel, sum over the group's channels of values) for each group of a block.
  template <class A, class Finish>
  void for_each_group(int64_t width, const A* values, const Finish& finish) const {
    for (int64_t c = 0; c < width; c += group_channels) {
      A total = 0;
      for (int64_t j = c; j < c + group_channels; ++j) total += values[j];
      finish(c, total);
    }
  }

  int64_t offset(int64_t b, int64_t begin) const {
    return b * channels * positions + begin * (layout == Layout::channels_first ? positions : 1);
  }

 private:
  int64_t units_per_sample() const { return (channels + unit_channels - 1) / unit_channels; }
  bool serial() const { return batch * channels * positions < serial_elements; }

  // Whole rows for the usual channel counts: memory then streams in order, which outweighs a block that fits the cache.
  static constexpr int64_t channels_last_unit = 1024;
};

// A block of an image as the passes see it: the image's own memory, or a widened copy of float16 and bfloat16.
template <class T, Layout layout>
struct Block {
  using A = accumulate_t<T>;
  static constexpr bool widened = !std::is_same_v<T, A>;

  Block(const Plan& plan_, int64_t b, int64_t begin, int64_t width_)
      : plan(plan_), origin(plan_.offset(b, begin)), width(width_), pitch(widened ? width_ : plan_.channels) {}

  // The block of an input image, filled; or of an output image, to be filled and then given to `finish`.
  const A* read(const T* image, std::vector<A>& copy) const {
    if constexpr (widened) {
      copy.resize(width * plan.positions);
      plan.for_range(width, pitch, [&](Range range) {
        multiversion<Convert<T, A, layout>>(image + origin, plan.channels, copy.data(), pitch, range);
      });
      return copy.data();
    } else {
      return image + origin;
    }
  }
  A* write(T* image, std::vector<A>& copy) const {
    if constexpr (widened) {
      return copy.data();
    } else {
      return image + origin;
    }
  }
  void finish(T* image, const std::vector<A>& copy) const {
    if constexpr (widened) {
      plan.for_range(width, pitch, [&](Range range) {
        multiversion<Convert<A, T, layout>>(copy.data(), pitch, image + origin, plan.channels, range);
      });
    }
  }
  template <class Pass>
  void for_range(const Pass& pass) const {
    plan.for_range(width, pitch, pass);
  }

  const Plan& plan;
  int64_t origin, width, pitch;
};

// The small per-channel arrays of a call, [B, C] each.
template <class A>
struct Workspace {
  std::vector<A> mean, rstd, gamma, beta;

  // gamma = weight * scale, beta = bias * scale + shift.
  Workspace(int64_t batch, int64_t channels, const A* scale, const A* shift, const A* weight, const A* bias)
      : mean(batch * channels, A(0)),
        rstd(batch * channels, A(1)),
        gamma(scale, scale + batch * channels),
        beta(shift, shift + batch * channels) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = b * channels + c;
        if (weight != nullptr) gamma[i] = weight[c] * scale[i];
        if (bias != nullptr) beta[i] = bias[c] * scale[i] + shift[i];
      }
    }
  }

  Channels<A> at(int64_t offset) const {
    return {mean.data() + offset, rstd.data() + offset, gamma.data() + offset, beta.data() + offset};
  }
};

template <class T, Layout layout, Activation activation>
void forward(const Plan& plan, const T* x, T* y, Workspace<accumulate_t<T>>& workspace, accumulate_t<T>* mean,
             accumulate_t<T>* rstd, accumulate_t<T> eps, accumulate_t<T> negative_slope) {
  using A = accumulate_t<T>;
  const A count = static_cast<A>(plan.group_channels * plan.positions);
  std::vector<A> totals(plan.batch * plan.channels);
  plan.for_each_unit([&](int64_t b, int64_t begin, int64_t end) {
    const Block<T, layout> block(plan, b, begin, end - begin);
    std::vector<A> copy;
    const A* x_block = block.read(x, copy);
    A* y_block = block.write(y, copy);
    const int64_t at = b * plan.channels + begin, width = plan.group_channels;
    const Channels<A> channels = workspace.at(at);
    A* total = totals.data() + at;
    if (plan.groups > 0) {
      const int64_t first_group = b * plan.groups + begin / width;
      A* channel_mean = workspace.mean.data() + at;
      if constexpr (layout == Layout::channels_first) {
        // The block is one group, and unless threads share it, one run of memory.
        const auto sum = [&]<bool squares>() {
          if (!plan.split) {
            const Range whole{0, 1, 0, block.width * plan.positions};
            multiversion<PlaneSums<A, squares>>(x_block, whole, channels.mean, total);
            return total[0];
          }
          block.for_range(
              [&](Range range) { multiversion<PlaneSums<A, squares>>(x_block, range, channels.mean, total); });
          return std::accumulate(total, total + block.width, A(0));
        };
        std::fill_n(channel_mean, block.width, sum.template operator()<false>() / count);
        const A squares = sum.template operator()<true>();
        std::fill_n(total, block.width, A(0));
        total[0] = squares;
      } else {
        block.for_range([&](Range range) { multiversion<ColumnMoments<A>>(x_block, range, channel_mean, total); });
        plan.for_each_group(block.width, channels.mean, [&](int64_t c, A sum) {
          const A group_mean = sum / static_cast<A>(width);
          for (int64_t j = c; j < c + width; ++j) {
            const A apart = channel_mean[j] - group_mean;
            total[j] += static_cast<A>(plan.positions) * apart * apart;
            channel_mean[j] = group_mean;
          }
        });
      }
      plan.for_each_group(block.width, total, [&](int64_t c, A sum) {
        const A value = A(1) / std::sqrt(sum / count + eps);
        mean[first_group + c / width] = channel_mean[c];
        rstd[first_group + c / width] = value;
        std::fill_n(workspace.rstd.begin() + at + c, width, value);
      });
    }
    block.for_range([&](Range range) {
      multiversion<Apply<A, layout, activation>>(x_block, y_block, range, channels, negative_slope);
    });
    block.finish(y, copy);
  });
}

template <class T, Layout layout, Activation activation>
void backward(const Plan& plan, const T* dy, const T* x, T* dx, Workspace<accumulate_t<T>>& workspace,
              const accumulate_t<T>* mean, const accumulate_t<T>* rstd, accumulate_t<T>* dgamma, accumulate_t<T>* dbeta,
              accumulate_t<T> negative_slope) {
  using A = accumulate_t<T>;
  const A count = static_cast<A>(plan.group_channels * plan.positions);
  std::vector<A> offsets(plan.batch * plan.channels), tilts(plan.batch * plan.channels);
  plan.for_each_unit([&](int64_t b, int64_t begin, int64_t end) {
    const Block<T, layout> block(plan, b, begin, end - begin);
    std::vector<A> copy, dy_copy;
    const A *x_block = block.read(x, copy), *dy_block = block.read(dy, dy_copy);
    A* dx_block = block.write(dx, dy_copy);
    const int64_t at = b * plan.channels + begin, width = plan.group_channels;
    const Channels<A> channels = workspace.at(at);
    A *offset = offsets.data() + at, *tilt = tilts.data() + at;
    if (plan.groups == 0) {
      block.for_range([&](Range range) {
        multiversion<BackwardSums<A, layout, activation, false>>(dy_block, x_block, dx_block, range, channels,
                                                                 dgamma + at, dbeta + at, negative_slope);
      });
      return block.finish(dx, dy_copy);
    }
    for (int64_t c = 0; c < block.width; ++c) {
      const int64_t group = b * plan.groups + (begin + c) / width;
      workspace.mean[at + c] = mean[group];
      workspace.rstd[at + c] = rstd[group];
    }
    block.for_range([&](Range range) {
      multiversion<BackwardSums<A, layout, activation, true>>(dy_block, x_block, dx_block, range, channels, dgamma + at,
                                                              dbeta + at, negative_slope);
    });
    // dx = rstd (gamma dt - mean(gamma dt) - x_hat mean(gamma dt x_hat)), the means over the group.
    for (int64_t c = 0; c < block.width; ++c) {
      offset[c] = channels.gamma[c] * dbeta[at + c];
      tilt[c] = channels.gamma[c] * dgamma[at + c];
    }
    plan.for_each_group(block.width, offset,
                        [&](int64_t c, A sum) { std::fill_n(offset + c, width, channels.rstd[c] * sum / count); });
    plan.for_each_group(block.width, tilt, [&](int64_t c, A sum) {
      std::fill_n(tilt + c, width, channels.rstd[c] * channels.rstd[c] * sum / count);
    });
    block.for_range([&](Range range) {
      multiversion<BackwardApply<A, layout, activation>>(dy_block, x_block, dx_block, range, channels,
                                                         static_cast<const A*>(offset), static_cast<const A*>(tilt),
                                                         negative_slope);
    });
    block.finish(dx, dy_copy);
  });
}

// Calls body<layout, activation>(negative slope) for the schema's activation: 0 none, 1 relu, 2 leaky_relu, 3 silu.
template <class Body>
void for_layout_and_activation(Layout layout, int64_t activation, double negative_slope, const Body& body) {
  const auto with_layout = [&]<Layout L>() {
    if (activation == 1) return body.template operator()<L, Activation::relu>(0.0);
    if (activation == 3) return body.template operator()<L, Activation::silu>(0.0);
    return body.template operator()<L, Activation::leaky_relu>(activation == 2 ? negative_slope : 1.0);
  };
  if (layout == Layout::channels_first) {
    with_layout.template operator()<Layout::channels_first>();
  } else {
    with_layout.template operator()<Layout::channels_last>();
  }
}

// The per-channel inputs, contiguous and in the statistics dtype.
template <class A>
struct Affine {
  Tensor scale, shift;
  std::optional<Tensor> weight, bias;

  Affine(const Tensor& scale_, const Tensor& shift_, const std::optional<Tensor>& weight_,
         const std::optional<Tensor>& bias_)
      : scale(small(scale_, "scale")), shift(small(shift_, "shift")) {
    if (weight_) weight = small(*weight_, "weight");
    if (bias_) bias = small(*bias_, "bias");
  }

  Workspace<A> workspace(int64_t batch, int64_t channels) const {
    return {batch, channels, data<A>(scale), data<A>(shift), pointer(weight), pointer(bias)};
  }

  static const A* pointer(const std::optional<Tensor>& tensor) { return tensor ? data<A>(*tensor) : nullptr; }

 private:
  static Tensor small(const Tensor& tensor, const char* name) {
    check_same_dtype(tensor, name, scalar_type_of<A>());
    return make_contiguous(tensor);
  }
};

std::tuple<Tensor, Tensor, Tensor> style_modulation_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                                            const std::optional<Tensor>& weight,
                                                            const std::optional<Tensor>& bias, int64_t groups,
                                                            double eps, int64_t activation, double negative_slope) {
  return dispatch_floating(x, "x", [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    using A = accumulate_t<T>;
    const Image image(x);
    const Affine<A> affine(scale, shift, weight, bias);
    Tensor y = empty_image(image.tensor, image.layout);
    Tensor mean = empty(x, {image.batch, groups}, scalar_type_of<A>());
    Tensor rstd = empty(x, {image.batch, groups}, scalar_type_of<A>());
    if (x.numel() == 0) {
      std::fill_n(mutable_data<A>(mean), mean.numel(), std::numeric_limits<A>::quiet_NaN());
      std::fill_n(mutable_data<A>(rstd), rstd.numel(), std::numeric_limits<A>::quiet_NaN());
      return {y, mean, rstd};
    }
    const Plan plan(image, groups);
    auto workspace = affine.workspace(plan.batch, plan.channels);
    for_layout_and_activation(plan.layout, activation, negative_slope, [&]<Layout L, Activation act>(double slope) {
      forward<T, L, act>(plan, data<T>(image.tensor), mutable_data<T>(y), workspace, mutable_data<A>(mean),
                         mutable_data<A>(rstd), static_cast<A>(eps), static_cast<A>(slope));
    });
    return {y, mean, rstd};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> style_modulation_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& scale, const Tensor& shift,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t groups, int64_t activation,
    double negative_slope) {
  return dispatch_floating(x, "x", [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
    using A = accumulate_t<T>;
    constexpr ScalarType statistics = scalar_type_of<A>();
    check_same_dtype(dy, "dy", x.scalar_type());
    const Image image(x);
    const Affine<A> affine(scale, shift, weight, bias);
    const Tensor gradient = in_layout(dy, image.layout), means = make_contiguous(mean), rstds = make_contiguous(rstd);
    const int64_t B = image.batch, C = image.channels;
    Tensor dx = empty_image(image.tensor, image.layout);
    Tensor dscale = empty(x, {B, C}, statistics), dshift = empty(x, {B, C}, statistics);
    Tensor dweight = empty(x, {weight ? C : 0}, statistics), dbias = empty(x, {bias ? C : 0}, statistics);
    std::vector<A> dgamma(B * C, A(0)), dbeta(B * C, A(0));
    if (x.numel() > 0) {
      const Plan plan(image, groups);
      auto workspace = affine.workspace(B, C);
      for_layout_and_activation(plan.layout, activation, negative_slope, [&]<Layout L, Activation act>(double slope) {
        backward<T, L, act>(plan, data<T>(gradient), data<T>(image.tensor), mutable_data<T>(dx), workspace,
                            data<A>(means), data<A>(rstds), dgamma.data(), dbeta.data(), static_cast<A>(slope));
      });
    }
    // From the gradients of gamma = weight * scale and beta = bias * scale + shift to those of the four.
    const A *scales = data<A>(affine.scale), *weights = affine.pointer(affine.weight),
            *biases = affine.pointer(affine.bias);
    A *to_scale = mutable_data<A>(dscale), *to_shift = mutable_data<A>(dshift), *to_weight = mutable_data<A>(dweight),
      *to_bias = mutable_data<A>(dbias);
    std::fill_n(to_weight, dweight.numel(), A(0));
    std::fill_n(to_bias, dbias.numel(), A(0));
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t i = b * C + c;
        to_scale[i] = weights != nullptr ? dgamma[i] * weights[c] : dgamma[i];
        if (biases != nullptr) to_scale[i] += dbeta[i] * biases[c];
        to_shift[i] = dbeta[i];
        if (weights != nullptr) to_weight[c] += dgamma[i] * scales[i];
        if (biases != nullptr) to_bias[c] += dbeta[i] * scales[i];
      }
    }
    return {dx, dscale, dshift, dweight, dbias};
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("style_modulation_forward", TORCH_BOX(&fastdis::style_modulation_forward));
  m.impl("style_modulation_backward", TORCH_BOX(&fastdis::style_modulation_backward));
}
