#include "host_library.h"

#include "prototype_distances.cu"
#include "prototypical_loss.cu"

extern "C" {

const char* prototype_distances(int backward, int dtype, const void* queries, const void* prototypes, const void* grad,
                                void* distances, void* dqueries, void* dprototypes, int64_t episodes,
                                int64_t num_queries, int64_t num_prototypes, int64_t depth, int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::prototype_distances;
      using T = decltype(tag);
      using A = Accumulate<T>;
      const Device device{multiprocessors, 0};
      const Episodes<T> e{static_cast<const T*>(queries),
                          static_cast<const T*>(prototypes),
                          nullptr,
                          episodes,
                          num_queries,
                          num_prototypes,
                          depth,
                          false};
      with_scratch<A>(backward ? backward_scratch(e, false, device) : centre_size(e), [&](A* scratch) {
        if (backward) {
          launch_gradients<T>(e, GradientWeights<T>{static_cast<const T*>(grad), num_prototypes},
                              static_cast<T*>(dqueries), static_cast<T*>(dprototypes), scratch, device, nullptr);
        } else {
          forward<T>(e, static_cast<T*>(distances), scratch, device, nullptr);
        }
      });
    });
  });
}

const char* prototypical_loss(int backward, int dtype, const void* queries, const void* prototypes,
                              const int64_t* labels, const void* grad, void* loss, void* logsumexp, void* dqueries,
                              void* dprototypes, int reduction, int64_t episodes, int64_t num_queries,
                              int64_t num_prototypes, int64_t depth, int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::prototypical_loss;
      using T = decltype(tag);
      using A = Accumulate<T>;
      const Device device{multiprocessors, 0};
      const Episodes<T> e{static_cast<const T*>(queries),
                          static_cast<const T*>(prototypes),
                          nullptr,
                          episodes,
                          num_queries,
                          num_prototypes,
                          depth,
                          false};
      with_scratch<A>(backward ? backward_scratch(e, true, device) : forward_scratch(e), [&](A* scratch) {
        if (backward) {
          fastdis::prototypical_loss::backward<T>(
              e, static_cast<const T*>(grad), labels, static_cast<const A*>(logsumexp), reduction,
              static_cast<T*>(dqueries), static_cast<T*>(dprototypes), scratch, device, nullptr);
        } else {
          forward<T>(e, {labels, static_cast<T*>(loss), static_cast<A*>(logsumexp), reduction}, scratch, nullptr);
        }
      });
    });
  });
}

}  // extern "C"
