// jacobian_gram on CUDA: G = J J^T of every sample, and dJ = (dG + dG^T) J.

#include "gram.cuh"

namespace fastdis::jacobian_gram {

using namespace gram;

// dG + dG^T
template <typename A>
struct GradientMatrix {
  const A* grad;  // [batch, rows, rows]
  int64_t rows;

  __device__ __forceinline__ A operator()(int64_t sample, int64_t i, int64_t j) const {
    const A* own = grad + sample * rows * rows;
    return own[i * rows + j] + own[j * rows + i];
  }
};

}  // namespace fastdis::jacobian_gram

#ifndef FASTDIS_HOST_EMULATION

namespace fastdis::jacobian_gram {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr const char* kOp = "jacobian_gram";

Tensor forward_cuda(const Tensor& jacobian_) {
  const DeviceGuard guard(jacobian_.get_device_index());
  const JacobianTensor jacobian(kOp, jacobian_);
  const Tensor out = jacobian.empty_gram();
  dispatch(kOp, jacobian.tensor.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Layout layout = jacobian.layout();
    const T* data = input<T>(jacobian.tensor);
    const Plan plan = plan_gram(data, layout, device_of(jacobian.tensor.get_device_index()));
    const Tensor scratch = jacobian.empty({plan.scratch});
    launch_gram(data, layout, plan, output<A>(out), output<A>(scratch), current_stream(jacobian.tensor));
  });
  return out;
}

Tensor backward_cuda(const Tensor& grad_, const Tensor& jacobian_) {
  const DeviceGuard guard(jacobian_.get_device_index());
  const JacobianTensor jacobian(kOp, jacobian_);
  const Tensor grad = jacobian.checked_square(kOp, "grad", grad_), out = jacobian.empty_like();
  dispatch(kOp, jacobian.tensor.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Layout layout = jacobian.layout();
    launch_pull_back(input<T>(jacobian.tensor), layout, GradientMatrix<A>{input<A>(grad), layout.rows}, output<T>(out),
                     current_stream(jacobian.tensor));
  });
  return out;
}

}  // namespace
}  // namespace fastdis::jacobian_gram

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("jacobian_gram_forward", TORCH_BOX(&fastdis::jacobian_gram::forward_cuda));
  m.impl("jacobian_gram_backward", TORCH_BOX(&fastdis::jacobian_gram::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
