// Gram matrices of Jacobians on the CPU.

#include <torch/csrc/stable/library.h>

#include "gram.h"

namespace fastdis {

template void gram_of<float>(const Rows&, float*);
template void gram_of<double>(const Rows&, double*);
template void gram_of<float16>(const Rows&, float*);
template void gram_of<bfloat16>(const Rows&, float*);
template Tensor mixed<float>(const Rows&, const float*);
template Tensor mixed<double>(const Rows&, const double*);
template Tensor mixed<float16>(const Rows&, const float*);
template Tensor mixed<bfloat16>(const Rows&, const float*);

namespace {

Tensor jacobian_gram_forward(const Tensor& jacobian) {
  const Rows rows(jacobian);
  return dispatch_floating(jacobian, "jacobian", [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor gram = empty(jacobian, {rows.batch, rows.latents, rows.latents}, scalar_type_of<A>());
    if (gram.numel() > 0) gram_of<T>(rows, mutable_data<A>(gram));
    return gram;
  });
}

// (grad + grad^T) J
Tensor jacobian_gram_backward(const Tensor& grad, const Tensor& jacobian) {
  const Rows rows(jacobian);
  const Tensor g = make_contiguous(grad);
  return dispatch_floating(jacobian, "jacobian", [&]<class T>() {
    using A = accumulate_t<T>;
    check_same_dtype(grad, "grad", scalar_type_of<A>());
    const int64_t latents = rows.latents;
    Buffer<A> matrices(grad.numel());
    for (int64_t b = 0; b < rows.batch; ++b) {
      const A* from = data<A>(g) + b * latents * latents;
      A* to = matrices.data() + b * latents * latents;
      for (int64_t i = 0; i < latents; ++i) {
        for (int64_t j = 0; j < latents; ++j) to[i * latents + j] = from[i * latents + j] + from[j * latents + i];
      }
    }
    return mixed<T>(rows, matrices.data());
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("jacobian_gram_forward", TORCH_BOX(&fastdis::jacobian_gram_forward));
  m.impl("jacobian_gram_backward", TORCH_BOX(&fastdis::jacobian_gram_backward));
}
