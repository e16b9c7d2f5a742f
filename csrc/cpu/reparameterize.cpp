// Draws from diagonal Gaussians on the CPU, with noise that is a function of the seed and the position alone.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../core/philox.h"
#include "../core/tensor.h"

namespace fastdis {
namespace {

constexpr int64_t counters = PhiloxWords::counters;
constexpr int64_t block = 4 * counters;  // elements handled at a time

// Two normal numbers from two words, by Box and Muller: radius sqrt(-2 log((a + 1/2) / 2^32)), angle 2 pi b / 2^32.
FASTDIS_INLINE void box_muller(uint32_t a, uint32_t b, float& cosine, float& sine) {
  // From sqrt(1/2) to 1 the logarithm is taken of what is missing to 1: rounding a would leave no digit of it.
  const bool high = a >= 0xB504F334u;
  const float missing = (static_cast<float>(~a) + 0.5f) * 0x1p-32f;
  const Scaled low = scaled((static_cast<float>(a) + 0.5f) * 0x1p-32f);
  const float radius = std::sqrt(-2.0f * logarithm(high ? Scaled{-missing, 0.0f} : low));
  // The angle in quarter turns, to the nearest, from -1/2 to 1/2.
  const uint32_t quarter = (b + 0x20000000u) >> 30;
  const float rest = static_cast<float>(static_cast<int32_t>(b - (quarter << 30))) * (0x1.921fb6p+0f * 0x1p-30f);
  const float square = rest * rest;
  float s = 2.7183114e-6f;  // minimax on [-pi/4, pi/4]
  s = s * square - 1.9839334e-4f;
  s = s * square + 8.3333293e-3f;
  s = s * square - 1.6666667e-1f;
  s = s * square * rest + rest;
  float c = 2.4390448e-5f;
  c = c * square - 1.3887316e-3f;
  c = c * square + 4.1666638e-2f;
  c = c * square * square - 0.5f * square + 1.0f;
  const bool odd = (quarter & 1u) != 0;
  const float x = odd ? s : c, y = odd ? c : s;
  cosine = radius * ((quarter + 1u) & 2u ? -x : x);
  sine = radius * (quarter & 2u ? -y : y);
}

inline void box_muller(uint32_t a, uint32_t b, double& cosine, double& sine) {
  const double radius = std::sqrt(-2.0 * std::log((static_cast<double>(a) + 0.5) * 0x1p-32));
  const double angle = 0x1.921fb54442d18p+2 * 0x1p-32 * static_cast<double>(b);
  cosine = radius * std::cos(angle);
  sine = radius * std::sin(angle);
}

// The noise of `block` elements from counter `first` on, in their order.
template <class Isa, class A>
FASTDIS_INLINE void fill_noise(uint64_t key, uint64_t first, A* noise) {
  PhiloxWords words;
  words.fill<Isa>(key, first, 0);
  A normal[4][counters];
  for (int pair = 0; pair < 4; pair += 2) {
#pragma omp simd
    for (int64_t i = 0; i < counters; ++i) {
      box_muller(words.word[pair][i], words.word[pair + 1][i], normal[pair][i], normal[pair + 1][i]);
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < counters; ++i) {
    for (int w = 0; w < 4; ++w) noise[4 * i + w] = normal[w][i];
  }
}

// Elements first to last of a run; first is a multiple of the block. Forward, from = mean: to = mean + exp(logvar / 2)
// noise, and unless it is null kept = exp(logvar / 2) noise. Backward, from = grad: to = grad exp(logvar / 2) noise
// / 2.
template <class T, bool backward>
struct Draw {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* from, const T* logvar, T* to, accumulate_t<T>* kept, uint64_t key,
                                 int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    A noise[block];
    for (; first < last; first += block) {
      fill_noise<Isa>(key, static_cast<uint64_t>(first / 4), noise);
      const int64_t count = std::min(block, last - first);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) noise[i] *= exponential(A(0.5) * load(logvar + first, i));
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A x = load(from + first, i);
        store(to + first, i, backward ? A(0.5) * x * noise[i] : x + noise[i]);
      }
      if (kept != nullptr) std::copy_n(noise, count, kept + first);
    }
  }
};

// dlogvar = grad kept / 2
template <class T>
struct FromKept {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* grad, const accumulate_t<T>* kept, T* to, int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; ++i) store(to, i, accumulate_t<T>(0.5) * load(grad, i) * kept[i]);
  }
};

std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// A tensor like `first` made of it, logvar and noise, each seed's run in blocks that keep to their counters.
template <bool backward, class T>
Tensor draw(const Tensor& first, const Tensor& logvar, const Tensor& seed, accumulate_t<T>* kept) {
  const Tensor a = make_contiguous(first), v = make_contiguous(logvar), keys = make_contiguous(seed);
  Tensor result = empty(first, sizes_of(first), first.scalar_type());
  const int64_t runs = seed.numel(), total = first.numel(), run = total / runs, blocks = (run + block - 1) / block;
  const auto fill = [&](int64_t begin, int64_t end) {
    while (begin < end) {  // as many blocks at a time as one run has
      const int64_t r = begin / blocks, stop = std::min(end, (r + 1) * blocks), at = r * run;
      multiversion<Draw<T, backward>>(data<T>(a) + at, data<T>(v) + at, mutable_data<T>(result) + at,
                                      kept == nullptr ? nullptr : kept + at,
                                      static_cast<uint64_t>(data<int64_t>(keys)[r]), (begin - r * blocks) * block,
                                      std::min(run, (stop - r * blocks) * block));
      begin = stop;
    }
  };
  if (total < serial_elements / 4) {  // an element costs more than reading one
    fill(0, runs * blocks);
  } else {
    torch::stable::parallel_for(0, runs * blocks, 16, fill);
  }
  return result;
}

void check(const Tensor& first, const char* name, const Tensor& logvar, const Tensor& seed) {
  check_same_dtype(logvar, "logvar", first.scalar_type());
  check_same_dtype(seed, "seed", ScalarType::Long);
  const int64_t runs = seed.numel(), total = first.numel();
  STD_TORCH_CHECK(runs > 0 && total % runs == 0, "seed has ", runs, " elements; a divisor of the ", total,
                  " elements of ", name, " is needed");
}

std::tuple<Tensor, Tensor> reparameterize_forward(const Tensor& mean, const Tensor& logvar, const Tensor& seed,
                                                  bool keep) {
  check(mean, "mean", logvar, seed);
  return dispatch_floating(mean, "mean", [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using A = accumulate_t<T>;
    Tensor kept = empty(mean, keep ? sizes_of(mean) : std::vector<int64_t>{0}, scalar_type_of<A>());
    return {draw<false, T>(mean, logvar, seed, keep ? mutable_data<A>(kept) : nullptr), kept};
  });
}

Tensor reparameterize_backward(const Tensor& grad, const Tensor& logvar, const Tensor& seed, const Tensor& kept) {
  check(grad, "grad", logvar, seed);
  return dispatch_floating(grad, "grad", [&]<class T>() {
    using A = accumulate_t<T>;
    if (kept.numel() != grad.numel()) return draw<true, T>(grad, logvar, seed, nullptr);
    const Tensor g = make_contiguous(grad), noise = make_contiguous(kept);
    Tensor result = empty(grad, sizes_of(grad), grad.scalar_type());
    const auto run = [&](int64_t first, int64_t last) {
      multiversion<FromKept<T>>(data<T>(g), data<A>(noise), mutable_data<T>(result), first, last);
    };
    if (grad.numel() < 4 * serial_elements) {
      run(0, grad.numel());
    } else {
      torch::stable::parallel_for(0, grad.numel(), serial_elements, run);
    }
    return result;
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("reparameterize_forward", TORCH_BOX(&fastdis::reparameterize_forward));
  m.impl("reparameterize_backward", TORCH_BOX(&fastdis::reparameterize_backward));
}
