// Penalties on the pull-back metric on the CPU: of Gram matrices, so that only their making touches the Jacobian.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gram.h"

namespace fastdis {
namespace {

enum class Kind : int64_t { isometry, scaled_isometry, conformal, relaxed_distortion, orthogonality };

// The penalties compare G with a multiple of the identity, c I. Sums over samples are in double precision.
template <class A>
struct Penalty {
  Kind kind;
  int64_t batch, latents;
  const A* gram;
  double mean_trace = 0;

  Penalty(int64_t kind_, int64_t batch_, int64_t latents_, const A* gram_)
      : kind(static_cast<Kind>(kind_)), batch(batch_), latents(latents_), gram(gram_) {
    for (int64_t b = 0; b < batch; ++b) mean_trace += trace(b);
    mean_trace /= static_cast<double>(batch);
  }

  double trace(int64_t b) const {
    double sum = 0;
    for (int64_t i = 0; i < latents; ++i) sum += gram[(b * latents + i) * latents + i];
    return sum;
  }

  // What is compared with the diagonal of sample b.
  A target(int64_t b) const {
    switch (kind) {
      case Kind::isometry:
        return A(1);
      case Kind::scaled_isometry:
        return static_cast<A>(mean_trace / static_cast<double>(latents));
      case Kind::conformal:
        return static_cast<A>(trace(b) / static_cast<double>(latents));
      default:
        return A(0);
    }
  }

  // The mean over samples of the squared entries of G - c I, with its diagonal or without.
  double mean_square() const {
    double sum = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const A c = target(b);
      for (int64_t i = 0; i < latents; ++i) {
        for (int64_t j = 0; j < latents; ++j) {
          if (i == j && kind == Kind::orthogonality) continue;
          const double entry = gram[(b * latents + i) * latents + j] - (i == j ? c : A(0));
          sum += entry * entry;
        }
      }
    }
    return sum / static_cast<double>(batch);
  }

  double value() const {
    return kind == Kind::relaxed_distortion ? mean_square() / (mean_trace * mean_trace) : mean_square();
  }

  // The matrices that take the Jacobian to grad times the penalty's gradient.
  Buffer<A> matrices(double grad) const {
    const bool relaxed = kind == Kind::relaxed_distortion;
    const double scale = 4 * grad / static_cast<double>(batch) / (relaxed ? mean_trace * mean_trace : 1.0);
    const double ratio = relaxed ? mean_square() / mean_trace : 0.0;
    Buffer<A> result(batch * latents * latents);
    for (int64_t b = 0; b < batch; ++b) {
      const double c = relaxed ? ratio : static_cast<double>(target(b));
      for (int64_t i = 0; i < latents; ++i) {
        for (int64_t j = 0; j < latents; ++j) {
          const int64_t at = (b * latents + i) * latents + j;
          const bool left_out = i == j && kind == Kind::orthogonality;
          result[at] = left_out ? A(0) : static_cast<A>(scale * (gram[at] - (i == j ? c : 0.0)));
        }
      }
    }
    return result;
  }
};

void check_kind(int64_t kind) { STD_TORCH_CHECK(kind >= 0 && kind <= 4, "kind is ", kind, "; 0 to 4 are allowed"); }

std::tuple<Tensor, Tensor> isometry_penalty_forward(const Tensor& jacobian, int64_t kind) {
  check_kind(kind);
  const Rows rows(jacobian);
  return dispatch_floating(jacobian, "jacobian", [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using A = accumulate_t<T>;
    Tensor gram = empty(jacobian, {rows.batch, rows.latents, rows.latents}, scalar_type_of<A>());
    Tensor loss = empty(jacobian, {}, scalar_type_of<A>());
    if (gram.numel() > 0) gram_of<T>(rows, mutable_data<A>(gram));
    *mutable_data<A>(loss) = static_cast<A>(Penalty<A>(kind, rows.batch, rows.latents, data<A>(gram)).value());
    return {loss, gram};
  });
}

Tensor isometry_penalty_backward(const Tensor& grad, const Tensor& jacobian, const Tensor& gram, int64_t kind) {
  check_kind(kind);
  const Rows rows(jacobian);
  const Tensor g = make_contiguous(gram);
  return dispatch_floating(jacobian, "jacobian", [&]<class T>() {
    using A = accumulate_t<T>;
    check_same_dtype(grad, "grad", scalar_type_of<A>());
    check_same_dtype(gram, "gram", scalar_type_of<A>());
    if (jacobian.numel() == 0) return rows.empty_like();
    const Penalty<A> penalty(kind, rows.batch, rows.latents, data<A>(g));
    return mixed<T>(rows, penalty.matrices(*data<A>(grad)).data());
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("isometry_penalty_forward", TORCH_BOX(&fastdis::isometry_penalty_forward));
  m.impl("isometry_penalty_backward", TORCH_BOX(&fastdis::isometry_penalty_backward));
}
