// The schema of every op: the contract between Python, the CPU kernels, the CUDA kernels and the Triton kernels.
//
// Forward and backward are separate ops. Statistics that backward needs are outputs of forward. Shapes:
// B batch, C channels, * spatial, E episodes, Q queries, N prototypes, D dimensions.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastdis, m) {
  // x [B, C, *] contiguous or channels-last; scale, shift [B, C] and weight, bias [C] in the statistics dtype
  // (float64 for float64, else float32).  activation: 0 none, 1 relu, 2 leaky_relu, 3 silu.
  // y like x; mean, rstd [B, groups] in the statistics dtype.
  m.def(
      "style_modulation_forward(Tensor x, Tensor scale, Tensor shift, Tensor? weight, Tensor? bias, "
      "SymInt groups, float eps, SymInt activation, float negative_slope) -> (Tensor, Tensor, Tensor)");
  // dx like x; dscale, dshift [B, C]; dweight, dbias [C], empty where weight or bias was None.
  m.def(
      "style_modulation_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor scale, Tensor shift, "
      "Tensor? weight, Tensor? bias, SymInt groups, SymInt activation, float negative_slope) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // queries [E, Q, D], prototypes [E, N, D] -> squared distances [E, Q, N] in the input dtype.
  m.def("prototype_distances_forward(Tensor queries, Tensor prototypes) -> Tensor");
  // grad [E, Q, N] -> dqueries, dprototypes.
  m.def("prototype_distances_backward(Tensor grad, Tensor queries, Tensor prototypes) -> (Tensor, Tensor)");

  // labels [E, Q] int64; reduction: 0 none, 1 mean, 2 sum.
  // loss [E, Q] or [] in the input dtype; logsumexp [E, Q] of the centred logits, in the statistics dtype.
  m.def(
      "prototypical_loss_forward(Tensor queries, Tensor prototypes, Tensor labels, SymInt reduction) "
      "-> (Tensor, Tensor)");
  // grad [E, Q] or [] -> dqueries, dprototypes.
  m.def(
      "prototypical_loss_backward(Tensor grad, Tensor queries, Tensor prototypes, Tensor labels, "
      "Tensor logsumexp, SymInt reduction) -> (Tensor, Tensor)");
}
