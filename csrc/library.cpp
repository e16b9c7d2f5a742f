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

  // Sub-gradient fields. noise [B, *], fields [B, N, *]; coefficient [B], weights [N] or [B, N] in the statistics
  // dtype. noise + coefficient * sum_n weights_n fields_n, like noise.
  m.def("sum_gradient_fields_forward(Tensor noise, Tensor fields, Tensor coefficient, Tensor? weights) -> Tensor");
  // dfields: for_fields ? [B, 1, *] where weights is None (all factors' are the same), else [B, N, *] : empty.
  // products [B, N] of grad with each field, in the statistics dtype: fields ? that : empty.
  m.def(
      "sum_gradient_fields_backward(Tensor grad, Tensor? fields, Tensor coefficient, Tensor? weights, "
      "bool for_fields) -> (Tensor, Tensor)");

  // x, noise, eta_noise [B, *]; alpha_bar, alpha_bar_prev, sigma [B] in the statistics dtype -> x_prev, x0 [B, *].
  m.def(
      "ddim_step_forward(Tensor x, Tensor noise, Tensor fields, Tensor alpha_bar, Tensor alpha_bar_prev, "
      "Tensor sigma, Tensor? weights, Tensor? eta_noise) -> (Tensor, Tensor)");
  // At least one grad. dx, dnoise, deta_noise [B, *]; dtotal [B, 1, *], of the weighted sum of fields; each empty
  // unless asked for.
  m.def(
      "ddim_step_backward(Tensor? grad_prev, Tensor? grad_x0, Tensor alpha_bar, Tensor alpha_bar_prev, "
      "Tensor sigma, bool for_x, bool for_noise, bool for_fields, bool for_eta_noise) "
      "-> (Tensor, Tensor, Tensor, Tensor)");

  // selected [B] int64 -> the shifted noise, x0, x0_selected [B, *]; weight [B] in the statistics dtype.
  m.def(
      "disdiff_terms_forward(Tensor x, Tensor noise, Tensor fields, Tensor selected, Tensor alpha_bar, "
      "Tensor alpha_bar_prev) -> (Tensor, Tensor, Tensor, Tensor)");
  // At least one grad. dx, dnoise [B, *]; dfields [B, factors, *], or [B, 1, *] for all factors where grad_selected is
  // None; each empty unless asked for.
  m.def(
      "disdiff_terms_backward(Tensor? grad_noise, Tensor? grad_x0, Tensor? grad_selected, Tensor selected, "
      "Tensor alpha_bar, Tensor alpha_bar_prev, SymInt factors, bool for_x, bool for_noise, bool for_fields) "
      "-> (Tensor, Tensor, Tensor)");

  // rows [1 + K, B, C, *], the primal first; or [1, B, C, *] beside directions [K, C, *] that all samples share.
  // bias [C] is added to the primal.  activation: 0 none, 1 relu, 2 leaky_relu (parameter: slope >= 0), 3 elu (alpha),
  // 4 silu, 5 gelu, 6 gelu_tanh, 7 tanh, 8 sigmoid, 9 softplus (beta).  -> [1 + K, B, C, *]
  m.def(
      "tangent_activation_forward(Tensor rows, Tensor? directions, Tensor? bias, SymInt activation, "
      "float parameter) -> Tensor");
  // At least one grad: grad_primal [B, C, *], grad_tangents [K, B, C, *].  saved: for activations 0 to 2 the primal of
  // the output, [1, B, C, *], else rows.  drows like rows, ddirections [K, C, *] and dbias [C], empty where theirs are.
  m.def(
      "tangent_activation_backward(Tensor? grad_primal, Tensor? grad_tangents, Tensor saved, Tensor? directions, "
      "Tensor? bias, SymInt activation, float parameter) -> (Tensor, Tensor, Tensor)");

  // jacobian [B, K, D], contiguous or a transposed contiguous [K, B, D] -> [B, K, K] in the statistics dtype.
  m.def("jacobian_gram_forward(Tensor jacobian) -> Tensor");
  // grad [B, K, K] in the statistics dtype -> (grad + grad^T) J in the dtype and layout of jacobian.
  m.def("jacobian_gram_backward(Tensor grad, Tensor jacobian) -> Tensor");

  // kind: 0 isometry, 1 scaled_isometry, 2 conformal, 3 relaxed_distortion, 4 orthogonality.
  // loss [] and gram [B, K, K] in the statistics dtype.
  m.def("isometry_penalty_forward(Tensor jacobian, SymInt kind) -> (Tensor, Tensor)");
  m.def("isometry_penalty_backward(Tensor grad, Tensor jacobian, Tensor gram, SymInt kind) -> Tensor");

  // z, mean, logvar [B, K] or [E, B, K].  estimator: 0 mws, 1 mss.  mutual information, total correlation,
  // dimension-wise divergence [] or [E]; and log q(z_i) [(E,) B], log q(z_ik) [(E,) B, K], up to a constant that is the
  // backend's own; in the statistics dtype.
  m.def(
      "total_correlation_forward(Tensor z, Tensor mean, Tensor logvar, SymInt dataset_size, SymInt estimator) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // grad [3] or [3, E]: of the three terms -> dz, dmean, dlogvar.
  m.def(
      "total_correlation_backward(Tensor grad, Tensor z, Tensor mean, Tensor logvar, Tensor log_joint, "
      "Tensor log_marginals, SymInt dataset_size, SymInt estimator) -> (Tensor, Tensor, Tensor)");

  // mean, logvar of any shape, seed [S] int64 with S a divisor of their number of elements -> like mean; and the scaled
  // noise, in the statistics dtype, if it is to be kept: only the CPU kernels do, who take longer to make it than to
  // read it. Else it is empty.
  m.def("reparameterize_forward(Tensor mean, Tensor logvar, Tensor seed, bool keep) -> (Tensor, Tensor)");
  // -> dlogvar, from the noise kept, or where that is empty, made again; dmean is grad itself.
  m.def("reparameterize_backward(Tensor grad, Tensor logvar, Tensor seed, Tensor kept) -> Tensor");

  // mean, logvar [B, K]; weights [K] in the statistics dtype; reduction: 0 none, 1 mean, 2 sum -> [B] or [].
  m.def("gaussian_kl_forward(Tensor mean, Tensor logvar, Tensor? weights, SymInt reduction) -> Tensor");
  // dmean, dlogvar [B, K]; dweights [K], empty where weights is None.
  m.def(
      "gaussian_kl_backward(Tensor grad, Tensor mean, Tensor logvar, Tensor? weights, SymInt reduction) "
      "-> (Tensor, Tensor, Tensor)");
}
