// Activations of primal rows and their slopes on tangent rows, on the CPU.
//
// Values, slopes and curvatures of a block of primal elements are computed once and stay in cache while the tangents of
// the block pass by.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../core/gemm.h"
#include "../core/tensor.h"

namespace fastdis {
namespace {

// At most: tangents are read and written at memory's pace only where each is for long.
constexpr int64_t block = 4096;
constexpr int64_t piecewise_linear = 3;  // activations below this number: the sign of the output gives the slope

template <class A>
struct Point {
  A value, slope, curvature;
};

FASTDIS_INLINE float hyperbolic_tangent(float x) {
  const float square = x * x;
  float p = -5.70498872745e-3f;  // Cephes, tanhf
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x, far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
  return square < 0.390625f ? near : far;
}
inline double hyperbolic_tangent(double x) { return std::tanh(x); }

// e^x - 1
FASTDIS_INLINE float exponential_less_one(float x) {
  float p = 2.4801587e-5f;  // 1 / 8!
  p = p * x + 1.9841270e-4f;
  p = p * x + 1.3888889e-3f;
  p = p * x + 8.3333333e-3f;
  p = p * x + 4.1666667e-2f;
  p = p * x + 1.6666667e-1f;
  p = p * x + 0.5f;
  const float near = p * x * x + x, far = exponential(x) - 1.0f;
  return x * x < 0.25f ? near : far;
}
inline double exponential_less_one(double x) { return std::expm1(x); }

// log(1 + x) for x from 0 to 1
FASTDIS_INLINE float logarithm_of_one_more(float x) {
  const float near = logarithm_near_one(x), far = logarithm_near_one(0.5f * x - 0.5f) + 0x1.62e430p-1f;
  return x < 0.41421356f ? near : far;
}
inline double logarithm_of_one_more(double x) { return std::log1p(x); }

// The normal distribution function.
FASTDIS_INLINE float normal_distribution(float x) {
  const float z = std::fabs(x) * 0x1.6a09e6p-1f;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;  // Press et al., Numerical Recipes, erfcc: to 1.2e-7 of the result
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float tail = 0.5f * t * exponential(p - z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}
inline double normal_distribution(double x) { return 0.5 * std::erfc(-x * 0x1.6a09e667f3bcdp-1); }

// Each activation at x, its slope and its curvature. `parameter`: negative slope, alpha or beta.
struct None {
  template <class A>
  static FASTDIS_INLINE Point<A> at(A x, A) {
    return {x, A(1), A(0)};
  }
};
struct LeakyRelu {  // ReLU with the parameter 0
  template <class A>
  static FASTDIS_INLINE Point<A> at(A x, A parameter) {
    const A slope = x > A(0) ? A(1) : parameter;
    return {x != x ? x : slope == A(0) ? A(0) : x * slope, slope, A(0)};
  }
};
struct Elu {
  template <class A>
  static FASTDIS_INLINE Point<A> at(A x, A parameter) {
    const A below = parameter * exponential_less_one(x), slope = below + parameter;
    return {x > A(0) ? x : below, x > A(0) ? A(1) : slope, x > A(0) ? A(0) : slope};
  }
};
struct Silu {
  template <class A>
  static FASTDIS_INLINE Point<A> at(A x, A) {
    const A s = logistic(x), rest = s * (A(1) - s);
    return {x * s, s + x * rest, rest * (A(2) + x * (A(1) - A(2) * s))};
  }
};
struct Gelu {
  template <class A>
  static FASTDIS_INLINE Point<A> at(A x, A) {
    const A below = normal_distribution(x), density = A(0.3989422804014327) * exponential(A(-0.5) * x * x);
    return {x * below, below + x * density, density * (A(2) - x * x)};
  }
};
struct GeluTanh {
  template <class A>
  static FASTDIS_INLINE Point<A> at(A x, A) {
    constexpr A scale = A(0.7978845608028654), cubic = A(0.044715);
    const A t = hyperbolic_tangent(scale * (x + cubic * x * x * x)), rest = A(1) - t * t;
    const A inner = scale * (A(1) + 3 * cubic * x * x), bend = scale * 6 * cubic * x;
    return {A(0.5) * x * (A(1) + t), A(0.5) * (A(1) + t) + A(0.5) * x * rest * inner,
            rest * inner + A(0.5) * x * rest * (bend - 2 * t * inner * inner)};
  }
};
struct Tanh {
  template <class A>
  static FASTDIS_INLINE Point<A> at(A x, A) {
    const A t = hyperbolic_tangent(x), slope = A(1) - t * t;
    return {t, slope, -2 * t * slope};
  }
};
struct Sigmoid {
  template <class A>
  static FASTDIS_INLINE Point<A> at(A x, A) {
    const A s = logistic(x), slope = s * (A(1) - s);
    return {s, slope, slope * (A(1) - 2 * s)};
  }
};
struct Softplus {
  template <class A>
  static FASTDIS_INLINE Point<A> at(A x, A parameter) {
    const A v = parameter * x, magnitude = v < A(0) ? -v : v, s = logistic(v);
    const A soft = ((v < A(0) ? A(0) : v) + logarithm_of_one_more(exponential(-magnitude))) / parameter;
    const bool linear = v > A(20);
    return {linear ? x : soft, linear ? A(1) : s, linear ? A(0) : parameter * s * (A(1) - s)};
  }
};

template <class Activation, class A>
FASTDIS_INLINE void points_of(const A* x, A parameter, int64_t count, A* value, A* slope, A* curvature) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Point<A> p = Activation::at(x[i], parameter);
    value[i] = p.value;
    slope[i] = p.slope;
    curvature[i] = p.curvature;
  }
}

// Values, slopes and curvatures of a block of primal elements.
template <class A>
struct Points {
  template <class Isa>
  static FASTDIS_INLINE void run(int64_t activation, const A* x, A parameter, int64_t count, A* value, A* slope,
                                 A* curvature) {
    switch (activation) {
      case 1:
        return points_of<LeakyRelu>(x, A(0), count, value, slope, curvature);
      case 2:
        return points_of<LeakyRelu>(x, parameter, count, value, slope, curvature);
      case 3:
        return points_of<Elu>(x, parameter, count, value, slope, curvature);
      case 4:
        return points_of<Silu>(x, parameter, count, value, slope, curvature);
      case 5:
        return points_of<Gelu>(x, parameter, count, value, slope, curvature);
      case 6:
        return points_of<GeluTanh>(x, parameter, count, value, slope, curvature);
      case 7:
        return points_of<Tanh>(x, parameter, count, value, slope, curvature);
      case 8:
        return points_of<Sigmoid>(x, parameter, count, value, slope, curvature);
      case 9:
        return points_of<Softplus>(x, parameter, count, value, slope, curvature);
      default:
        return points_of<None>(x, parameter, count, value, slope, curvature);
    }
  }
};

// Sizes of rows [R, B, C, S]; a tangent lies `stride` from the next; all samples share tangents that lie by themselves.
struct Layout {
  int64_t tangents, batch, channels, spatial, activation;

  Layout(const Tensor& rows, int64_t tangents_, int64_t activation_)
      : tangents(tangents_), batch(rows.size(1)), channels(rows.size(2)), spatial(1), activation(activation_) {
    for (int64_t d = 3; d < rows.dim(); ++d) spatial *= rows.size(d);
    STD_TORCH_CHECK(activation >= 0 && activation <= 9, "activation is ", activation, "; 0 to 9 are allowed");
  }
  int64_t sample() const { return channels * spatial; }
  int64_t row() const { return batch * sample(); }
};

// body(channel, begin, end) over runs of a block that starts at element `first` of a sample: runs of one channel, or,
// where a sample has one element a channel, of channels in their order.
template <class Body>
FASTDIS_INLINE void for_each_run(const Layout& layout, int64_t first, int64_t count, const Body& body) {
  for (int64_t i = 0; i < count;) {
    const int64_t channel = (first + i) / layout.spatial % layout.channels;
    const int64_t length =
        layout.spatial == 1 ? layout.channels - channel : layout.spatial - (first + i) % layout.spatial;
    const int64_t end = std::min(count, i + length);
    body(channel, i, end);
    i = end;
  }
}

// a = primal + bias over a block.
template <class T>
FASTDIS_INLINE void read_primal(const Layout& layout, const T* primal, const T* bias, int64_t first, int64_t count,
                                accumulate_t<T>* a) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) a[i] = load(primal, i);
  if (bias == nullptr) return;
  for_each_run(layout, first, count, [&](int64_t channel, int64_t begin, int64_t end) FASTDIS_INLINE_LAMBDA {
    if (layout.spatial == 1) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) a[i] += load(bias + channel, i - begin);
    } else {
      const accumulate_t<T> b = load(bias, channel);
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) a[i] += b;
    }
  });
}

// One block, `at` from the start of a row and `first` from that of a sample: primal to value, tangents times slope.
template <class T>
struct ForwardBlock {
  template <class Isa>
  static FASTDIS_INLINE void run(const Layout* layout, const T* rows, const T* directions, const T* bias,
                                 accumulate_t<T> parameter, T* to, int64_t at, int64_t first, int64_t count) {
    using A = accumulate_t<T>;
    A a[block], value[block], slope[block], curvature[block];
    const int64_t row = layout->row();
    read_primal(*layout, rows + at, bias, first, count, a);
    Points<A>::template run<Isa>(layout->activation, a, parameter, count, value, slope, curvature);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(to + at, i, value[i]);
    for (int64_t k = 0; k < layout->tangents; ++k) {
      const T* from = directions == nullptr ? rows + (k + 1) * row + at : directions + k * layout->sample() + first;
      T* target = to + (k + 1) * row + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) store(target, i, slope[i] * load(from, i));
    }
  }
};

// One block, backwards. of_directions [K][sample size] and of_bias [C] are added to.
template <class T>
struct BackwardBlock {
  template <class Isa>
  static FASTDIS_INLINE void run(const Layout* layout, const T* grad_primal, const T* grad_tangents, const T* saved,
                                 const T* directions, const T* bias, accumulate_t<T> parameter, T* drows,
                                 accumulate_t<T>* of_directions, accumulate_t<T>* of_bias, int64_t at, int64_t first,
                                 int64_t count) {
    using A = accumulate_t<T>;
    A a[block], value[block], slope[block], curvature[block], pull[block];
    const int64_t sample = layout->sample(), row = layout->row();
    const bool curved = layout->activation >= piecewise_linear;
    read_primal(*layout, saved + at, curved ? bias : nullptr, first, count, a);
    Points<A>::template run<Isa>(layout->activation, a, parameter, count, value, slope, curvature);
    std::fill_n(pull, count, A(0));  // of the tangents on the slope
    for (int64_t k = 0; k < layout->tangents && grad_tangents != nullptr; ++k) {
      const T* grad = grad_tangents + k * row + at;
      if (curved) {
        const T* from = directions == nullptr ? saved + (k + 1) * row + at : directions + k * sample + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) pull[i] += load(grad, i) * load(from, i);
      }
      if (of_directions != nullptr) {
        A* sum = of_directions + k * sample + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sum[i] += slope[i] * load(grad, i);
      } else {
        T* to = drows + (k + 1) * row + at;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(to, i, slope[i] * load(grad, i));
      }
    }
    if (grad_tangents == nullptr && of_directions == nullptr) {
      for (int64_t k = 0; k < layout->tangents; ++k) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(drows + (k + 1) * row + at, i, A(0));
      }
    }
    if (grad_primal == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) a[i] = curvature[i] * pull[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) a[i] = slope[i] * load(grad_primal + at, i) + curvature[i] * pull[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(drows + at, i, a[i]);
    if (of_bias == nullptr) return;
    for_each_run(*layout, first, count, [&](int64_t channel, int64_t begin, int64_t end) FASTDIS_INLINE_LAMBDA {
      if (layout->spatial == 1) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) of_bias[channel + i - begin] += a[i];
      } else {
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; ++i) sum += a[i];
        of_bias[channel] += sum;
      }
    });
  }
};

// body(part, at, first, count) over all blocks, cut into parts; with `by_columns` a part has all samples of its blocks,
// so that sums over samples are its own.
struct Walk {
  const Layout& layout;
  int64_t sample, size, blocks, samples, parts;  // blocks of a sample, or of the samples that are taken for one
  bool by_columns;

  Walk(const Layout& layout_, bool shared, bool by_columns_)
      : layout(layout_), sample(layout_.sample()), by_columns(by_columns_) {
    samples = layout.batch;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = std::clamp<int64_t>(layout.row() / (8 * threads), 512, block);  // several for every thread
    size = by_columns ? 64 : most;                       // columns alone have to make parts enough
    if (!shared && layout.spatial == 1 && sample > 0) {  // small samples share a block
      size = std::max<int64_t>(1, most / sample) * std::min(sample, most);
      sample = sample <= most ? layout.row() : sample;
      samples = sample == layout.row() ? 1 : samples;
    }
    blocks = (sample + size - 1) / size;
    const int64_t tasks = by_columns ? blocks : blocks * samples;
    const bool serial = layout.row() * (1 + layout.tangents) < serial_elements;
    parts = serial ? 1 : std::max<int64_t>(1, std::min<int64_t>(tasks, threads));
  }

  template <class Body>
  void operator()(const Body& body) const {
    if (layout.batch == 0) return;
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        if (by_columns) {
          for (int64_t i = part * blocks / parts; i < (part + 1) * blocks / parts; ++i) {
            for (int64_t b = 0; b < samples; ++b) one(body, part, b, i);
          }
        } else {
          const int64_t tasks = blocks * samples;
          for (int64_t i = part * tasks / parts; i < (part + 1) * tasks / parts; ++i) {
            one(body, part, i / blocks, i % blocks);
          }
        }
      }
    };
    if (parts == 1) return run(0, 1);
    torch::stable::parallel_for(0, parts, 1, run);
  }

  template <class Body>
  void one(const Body& body, int64_t part, int64_t b, int64_t i) const {
    body(part, b * sample + i * size, i * size, std::min(size, sample - i * size));
  }
};

std::vector<int64_t> sizes_with_rows(const Tensor& rows, int64_t count) {
  std::vector<int64_t> sizes(rows.sizes().begin(), rows.sizes().end());
  sizes[0] = count;
  return sizes;
}

Tensor tangent_activation_forward(const Tensor& rows, const std::optional<Tensor>& directions,
                                  const std::optional<Tensor>& bias, int64_t activation, double parameter) {
  if (directions) check_same_dtype(*directions, "directions", rows.scalar_type());
  if (bias) check_same_dtype(*bias, "bias", rows.scalar_type());
  const Layout layout(rows, directions ? directions->size(0) : rows.size(0) - 1, activation);
  const Tensor from = make_contiguous(rows), shared = make_contiguous(directions ? *directions : rows);
  const Tensor offset = make_contiguous(bias ? *bias : rows);
  return dispatch_floating(rows, "rows", [&]<class T>() {
    Tensor to = empty(rows, sizes_with_rows(rows, 1 + layout.tangents), rows.scalar_type());
    const T *rows_of = data<T>(from), *directions_of = directions ? data<T>(shared) : nullptr;
    const T* bias_of = bias ? data<T>(offset) : nullptr;
    T* target = mutable_data<T>(to);
    Walk(layout, directions.has_value(), false)([&](int64_t, int64_t at, int64_t first, int64_t count) {
      multiversion<ForwardBlock<T>>(&layout, rows_of, directions_of, bias_of, static_cast<accumulate_t<T>>(parameter),
                                    target, at, first, count);
    });
    return to;
  });
}

std::tuple<Tensor, Tensor, Tensor> tangent_activation_backward(
    const std::optional<Tensor>& grad_primal, const std::optional<Tensor>& grad_tangents, const Tensor& saved,
    const std::optional<Tensor>& directions, const std::optional<Tensor>& bias, int64_t activation, double parameter) {
  const bool curved = activation >= piecewise_linear;
  const int64_t tangents = directions      ? directions->size(0)
                           : curved        ? saved.size(0) - 1
                           : grad_tangents ? grad_tangents->size(0)
                                           : 0;
  const Layout layout(saved, tangents, activation);
  const Tensor of_primal = make_contiguous(grad_primal ? *grad_primal : saved);
  const Tensor of_tangents = make_contiguous(grad_tangents ? *grad_tangents : saved);
  const Tensor from = make_contiguous(saved);
  // Of piecewise linear activations the shapes of directions and bias are all that matters.
  const Tensor shared = curved && directions ? make_contiguous(*directions) : saved;
  const Tensor offset = curved && bias ? make_contiguous(*bias) : saved;
  return dispatch_floating(saved, "saved", [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    using A = accumulate_t<T>;
    Tensor drows = empty(saved, sizes_with_rows(saved, directions ? 1 : 1 + tangents), saved.scalar_type());
    std::vector<int64_t> sizes(1, 0);
    if (directions) sizes.assign(directions->sizes().begin(), directions->sizes().end());
    Tensor ddirections = empty(saved, sizes, saved.scalar_type());
    Tensor dbias = empty(saved, {bias ? layout.channels : 0}, saved.scalar_type());
    const Walk walk(layout, directions.has_value(), directions.has_value());
    const int64_t row = padded(layout.channels, column_pad<A>);
    Buffer<A> of_directions(directions ? tangents * layout.sample() : 0), of_bias(bias ? walk.parts * row : 0);
    const T* primal_of = grad_primal ? data<T>(of_primal) : nullptr;
    const T* tangents_of = grad_tangents ? data<T>(of_tangents) : nullptr;
    const T *saved_of = data<T>(from), *directions_of = directions ? data<T>(shared) : nullptr;
    const T* bias_of = bias ? data<T>(offset) : nullptr;
    T *to_rows = mutable_data<T>(drows), *to_directions = mutable_data<T>(ddirections),
      *to_bias = mutable_data<T>(dbias);
    walk([&](int64_t part, int64_t at, int64_t first, int64_t count) {
      multiversion<BackwardBlock<T>>(&layout, primal_of, tangents_of, saved_of, directions_of, bias_of,
                                     static_cast<A>(parameter), to_rows, directions ? of_directions.data() : nullptr,
                                     bias ? of_bias.data() + part * row : nullptr, at, first, count);
    });
    for (int64_t i = 0; i < static_cast<int64_t>(of_directions.size()); ++i) store(to_directions, i, of_directions[i]);
    for (int64_t c = 0; bias && c < layout.channels; ++c) {
      A sum = 0;
      for (int64_t part = 0; part < walk.parts; ++part) sum += of_bias[part * row + c];
      store(to_bias, c, sum);
    }
    return {drows, ddirections, dbias};
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("tangent_activation_forward", TORCH_BOX(&fastdis::tangent_activation_forward));
  m.impl("tangent_activation_backward", TORCH_BOX(&fastdis::tangent_activation_backward));
}
