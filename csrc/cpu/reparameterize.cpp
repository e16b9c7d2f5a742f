// Draws from diagonal Gaussians on the CPU, with noise that is a function of the seed and the position alone.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "../core/tensor.h"

namespace fastdis {
namespace {

constexpr int64_t counters = 64;         // Philox counters handled at a time
constexpr int64_t block = 4 * counters;  // elements that they give

// Words of Philox4x32-10 (Salmon et al., 2011) for consecutive counters under one key.
struct Words {
  uint32_t word[4][counters];

  FASTDIS_INLINE void fill(uint64_t key, uint64_t first) {
#pragma omp simd
    for (int64_t i = 0; i < counters; ++i) {
      const uint64_t counter = first + static_cast<uint64_t>(i);
      uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
      uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
      for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      word[0][i] = c0;
      word[1][i] = c1;
      word[2][i] = c2;
      word[3][i] = c3;
    }
  }
};

// Two normal numbers from two words, by Box and Muller: radius sqrt(-2 log((a + 1/2) / 2^32)), angle 2 pi b / 2^32.
FASTDIS_INLINE void box_muller(uint32_t a, uint32_t b, float& cosine, float& sine) {
  // Close to 1 the logarithm is taken of what is missing to 1, or rounding a would leave no digit of it.
  const bool high = a >= 0xB504F334u;  // 2^32 sqrt(1/2)
  const float missing = (static_cast<float>(~a) + 0.5f) * 0x1p-32f;
  const float below = logarithm((static_cast<float>(a) + 0.5f) * 0x1p-32f), above = logarithm_near_one(-missing);
  const float radius = std::sqrt(-2.0f * (high ? above : below));
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
template <class A>
FASTDIS_INLINE void fill_noise(uint64_t key, uint64_t first, A* noise) {
  Words words;
  words.fill(key, first);
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

// to = mean + exp(logvar / 2) noise for elements first to last of a run; first is a multiple of the block.
template <class T>
struct Draw {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* mean, const T* logvar, T* to, uint64_t key, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    A noise[block];
    for (; first < last; first += block) {
      fill_noise(key, static_cast<uint64_t>(first / 4), noise);
      const int64_t count = std::min(block, last - first);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        store(to + first, i, load(mean + first, i) + exponential(A(0.5) * load(logvar + first, i)) * noise[i]);
      }
    }
  }
};

// dlogvar = grad exp(logvar / 2) noise / 2
template <class T>
struct DrawBackward {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* grad, const T* logvar, T* to, uint64_t key, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    A noise[block];
    for (; first < last; first += block) {
      fill_noise(key, static_cast<uint64_t>(first / 4), noise);
      const int64_t count = std::min(block, last - first);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A deviation = exponential(A(0.5) * load(logvar + first, i));
        store(to + first, i, A(0.5) * load(grad + first, i) * (deviation * noise[i]));
      }
    }
  }
};

// A tensor like `first`, filled by the kernel from it and logvar, each seed's run in blocks that keep to their
// counters.
template <template <class> class Kernel>
Tensor draw(const Tensor& first, const char* name, const Tensor& logvar, const Tensor& seed) {
  check_same_dtype(logvar, "logvar", first.scalar_type());
  check_same_dtype(seed, "seed", ScalarType::Long);
  const Tensor a = make_contiguous(first), v = make_contiguous(logvar), keys = make_contiguous(seed);
  const int64_t runs = seed.numel(), total = first.numel();
  STD_TORCH_CHECK(runs > 0 && total % runs == 0, "seed has ", runs, " elements; a divisor of the ", total,
                  " elements of ", name, " is needed");
  return dispatch_floating(first, name, [&]<class T>() {
    const std::vector<int64_t> sizes(first.sizes().begin(), first.sizes().end());
    Tensor result = empty(first, sizes, first.scalar_type());
    const int64_t run = total / runs, blocks = (run + block - 1) / block;
    const auto fill = [&](int64_t begin, int64_t end) {
      while (begin < end) {  // as many blocks at a time as one run has
        const int64_t r = begin / blocks, stop = std::min(end, (r + 1) * blocks), at = r * run;
        multiversion<Kernel<T>>(data<T>(a) + at, data<T>(v) + at, mutable_data<T>(result) + at,
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
  });
}

Tensor reparameterize_forward(const Tensor& mean, const Tensor& logvar, const Tensor& seed) {
  return draw<Draw>(mean, "mean", logvar, seed);
}

Tensor reparameterize_backward(const Tensor& grad, const Tensor& logvar, const Tensor& seed) {
  return draw<DrawBackward>(grad, "grad", logvar, seed);
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("reparameterize_forward", TORCH_BOX(&fastdis::reparameterize_forward));
  m.impl("reparameterize_backward", TORCH_BOX(&fastdis::reparameterize_backward));
}
