// The pybind11 module fastdis._C: what was built, and what it runs on here. It includes no torch header.

// The pybind11 headers that torch 2.11 and 2.12 carry refuse to be compiled for a target version.
#undef TORCH_TARGET_VERSION

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/isa.h"
#include "core/threads.h"
#include "host/boosting.h"
#include "host/classes.h"
#include "host/hinge.h"
#include "host/histogram.h"
#include "host/logistic.h"
#include "host/neighbours.h"
#include "host/segments.h"
#include "host/shapes3d.h"
#include "host/votes.h"
#include "module.h"

#define FASTDIS_STRING_(...) #__VA_ARGS__
#define FASTDIS_STRING(...) FASTDIS_STRING_(__VA_ARGS__)

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " FASTDIS_STRING(__clang_major__) "." FASTDIS_STRING(__clang_minor__);
#elif defined(__GNUC__)
  return "gcc " FASTDIS_STRING(__GNUC__) "." FASTDIS_STRING(__GNUC_MINOR__);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["torch"] = FASTDIS_STRING(FASTDIS_BUILD_TORCH);
  info["cuda"] = FASTDIS_STRING(FASTDIS_BUILD_CUDA);
  info["cuda_architectures"] = FASTDIS_STRING(FASTDIS_BUILD_CUDA_ARCHITECTURES);
  info["debug"] = static_cast<bool>(FASTDIS_BUILD_DEBUG);
  info["processor"] = fastdis::processor();
  info["isa_compiled"] = std::vector<std::string>(fastdis::isa_names, fastdis::isa_names + fastdis::isa_compiled);
  info["isa_highest_here"] = fastdis::isa_names[static_cast<int>(fastdis::highest_isa())];
  info["isa_in_use"] = fastdis::isa_names[static_cast<int>(fastdis::isa())];
  return info;
}

// Histograms of codes and factors, and statistics of codes by factor. Codes are [d, n]; classes are [K, n], dense from
// 0, with their number in `sizes` [K].

using Reals = py::array_t<double, py::array::c_style>;
using Classes = py::array_t<int32_t, py::array::c_style>;

// The classes of all factors together.
int64_t check_classes(const Classes& classes, const Classes& sizes, int64_t n) {
  check_that(classes.ndim() == 2 && classes.shape(1) == n, "classes must be [K, n]");
  check_that(sizes.ndim() == 1 && sizes.shape(0) == classes.shape(0), "sizes must be [K]");
  int64_t sum = 0;
  for (py::ssize_t k = 0; k < sizes.shape(0); ++k) {
    check_that(sizes.data()[k] >= 0, "sizes must not be negative");
    sum += sizes.data()[k];
  }
  return sum;
}

constexpr int64_t most_rows = UINT32_MAX;

// (classes [K, n], sizes [K], values: a list of K arrays)
py::tuple dense_classes(const py::array_t<int64_t, py::array::c_style>& factors, int threads) {
  check_that(factors.ndim() == 2, "factors must be [n, K]");
  const int64_t n = factors.shape(0), K = factors.shape(1);
  check_that(n <= INT32_MAX, "there must be fewer than 2**31 rows");
  Classes classes({K, n}), sizes(K);
  int32_t *classes_out = classes.mutable_data(), *sizes_out = sizes.mutable_data();
  std::vector<std::vector<int64_t>> values(K);
  {
    const py::gil_scoped_release release;
    fastdis::parallel_ranges(K, 1, n * K < 100'000 ? 1 : threads, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        values[k] = fastdis::host::dense_classes(factors.data() + k, K, n, classes_out + k * n);
        sizes_out[k] = static_cast<int32_t>(values[k].size());
      }
    });
  }
  py::list all;
  for (const auto& of_factor : values) all.append(py::array_t<int64_t>(of_factor.size(), of_factor.data()));
  return py::make_tuple(classes, sizes, all);
}

// (rows [K, n], starts: of each factor one more than it has classes)
py::tuple group_rows(const Classes& classes, const Classes& sizes, int threads) {
  check_that(classes.ndim() == 2, "classes must be [K, n]");
  const int64_t K = classes.shape(0), n = classes.shape(1);
  const int64_t sum = check_classes(classes, sizes, n);
  check_that(n <= most_rows, "there must be fewer than 2**32 rows");
  py::array_t<uint32_t> rows({K, n});
  py::array_t<int64_t> starts(sum + K);
  uint32_t* rows_out = rows.mutable_data();
  std::vector<int64_t*> starts_out(K + 1, starts.mutable_data());
  for (int64_t k = 0; k < K; ++k) starts_out[k + 1] = starts_out[k] + sizes.data()[k] + 1;
  {
    const py::gil_scoped_release release;
    fastdis::parallel_ranges(K, 1, n * K < 100'000 ? 1 : threads, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        fastdis::host::group_rows(classes.data() + k * n, n, sizes.data()[k], rows_out + k * n, starts_out[k]);
      }
    });
  }
  return py::make_tuple(rows, starts);
}

py::array_t<int32_t> discretize(const Reals& codes, const Reals& edges, int threads) {
  check_that(codes.ndim() == 2, "codes must be [d, n]");
  const int64_t d = codes.shape(0), n = codes.shape(1);
  check_that(edges.ndim() == 2 && edges.shape(0) == d && edges.shape(1) >= 2 && edges.shape(1) - 1 <= INT32_MAX,
             "edges must be [d, bins + 1]");
  py::array_t<int32_t> bins({d, n});
  int32_t* out = bins.mutable_data();
  const py::gil_scoped_release release;
  fastdis::host::discretize(codes.data(), d, n, edges.data(), edges.shape(1) - 1, out, threads);
  return bins;
}

py::array_t<int64_t> joint_histogram(const Classes& rows, int32_t limit, const Classes& columns, const Classes& sizes,
                                     int threads) {
  check_that(rows.ndim() == 2 && limit >= 1, "rows must be [d, n] and limit positive");
  const int64_t d = rows.shape(0), n = rows.shape(1);
  py::array_t<int64_t> counts({d, check_classes(columns, sizes, n), int64_t{limit}});
  int64_t* out = counts.mutable_data();
  const py::gil_scoped_release release;
  fastdis::host::joint_histogram(rows.data(), d, limit, columns.data(), columns.shape(0), sizes.data(), n, out,
                                 threads);
  return counts;
}

py::array_t<double> gaussian_histogram(const Reals& mean, const Reals& std, const Reals& edges, const Classes& columns,
                                       const Classes& sizes, int threads) {
  check_that(mean.ndim() == 2 && std.ndim() == 2, "mean and std must be [d, n]");
  const int64_t d = mean.shape(0), n = mean.shape(1);
  check_that(std.shape(0) == d && std.shape(1) == n, "mean and std must have one shape");
  check_that(edges.ndim() == 2 && edges.shape(0) == d && edges.shape(1) >= 2 && edges.shape(1) - 1 <= INT32_MAX,
             "edges must be [d, bins + 1]");
  const int32_t limit = static_cast<int32_t>(edges.shape(1) - 1);
  py::array_t<double> mass({d, check_classes(columns, sizes, n), int64_t{limit}});
  double* out = mass.mutable_data();
  const py::gil_scoped_release release;
  fastdis::host::gaussian_histogram(mean.data(), std.data(), d, n, edges.data(), limit, columns.data(),
                                    columns.shape(0), sizes.data(), out, threads);
  return mass;
}

py::array_t<double> segment_spread(const Reals& codes, const Classes& classes, const Classes& sizes, double quantile,
                                   int threads) {
  check_that(codes.ndim() == 2, "codes must be [d, n]");
  check_that(quantile >= 0 && quantile <= 1, "quantile must be from 0 to 1");
  const int64_t d = codes.shape(0), n = codes.shape(1);
  check_that(n <= most_rows, "there must be fewer than 2**32 rows");
  py::array_t<double> spread({d, check_classes(classes, sizes, n)});
  double* out = spread.mutable_data();
  const py::gil_scoped_release release;
  fastdis::host::segment_spread(codes.data(), d, n, classes.data(), classes.shape(0), sizes.data(), quantile, out,
                                threads);
  return spread;
}

// Squared-hinge classifiers on one code each: (centre [d], slope [d, lines], height [d, lines]).
py::tuple hinge_lines(const Reals& codes, const Classes& classes, const Classes& sizes, double penalty, int threads) {
  check_that(codes.ndim() == 2 && codes.shape(0) > 0, "codes must be [n, d], with a row");
  const int64_t n = codes.shape(0), d = codes.shape(1), K = classes.shape(0);
  check_classes(classes, sizes, n);
  const int64_t lines = fastdis::host::hinge_line_count(sizes.data(), K);
  Reals centre(d), slope({d, lines}), height({d, lines});
  double *centre_out = centre.mutable_data(), *slope_out = slope.mutable_data(), *height_out = height.mutable_data();
  {
    const py::gil_scoped_release release;
    fastdis::host::hinge_lines(codes.data(), n, d, classes.data(), K, sizes.data(), penalty, centre_out, slope_out,
                               height_out, threads);
  }
  return py::make_tuple(centre, slope, height);
}

using Singles = py::array_t<float, py::array::c_style>;

// (importance [d], scores [trees, n], test_scores [trees, m]) of one factor.
py::tuple boost(const Singles& codes, const Classes& classes, int32_t size, const Singles& test_codes, int64_t rounds,
                int64_t depth, int64_t bins, double rate, uint64_t seed, int threads) {
  check_that(codes.ndim() == 2 && codes.shape(0) > 0 && codes.shape(0) <= INT32_MAX, "codes must be [n, d]");
  const int64_t n = codes.shape(0), d = codes.shape(1);
  check_that(classes.ndim() == 1 && classes.shape(0) == n, "classes must be [n]");
  check_that(test_codes.ndim() == 2 && test_codes.shape(1) == d, "test_codes must be [m, d]");
  check_that(size >= 2 && depth >= 0 && depth < 20 && rounds >= 0, "size, depth and rounds must make sense");
  const int64_t m = test_codes.shape(0), trees = fastdis::host::boosting_trees(size);
  Reals importance(d), scores({trees, n}), test_scores({trees, m});
  double *importance_out = importance.mutable_data(), *out = scores.mutable_data(),
         *test_out = test_scores.mutable_data();
  {
    const py::gil_scoped_release release;
    fastdis::host::boost(codes.data(), n, d, classes.data(), size, test_codes.data(), m,
                         {rounds, depth, bins, rate, seed}, importance_out, out, test_out, threads);
  }
  return py::make_tuple(importance, scores, test_scores);
}

Reals hinge_accuracy(const Reals& codes, const Classes& classes, const Classes& sizes, const Reals& centre,
                     const Reals& slope, const Reals& height, int threads) {
  check_that(codes.ndim() == 2, "codes must be [n, d]");
  const int64_t n = codes.shape(0), d = codes.shape(1), K = classes.shape(0);
  check_classes(classes, sizes, n);
  const int64_t lines = fastdis::host::hinge_line_count(sizes.data(), K);
  check_that(centre.size() == d && slope.size() == d * lines && height.size() == d * lines,
             "centre must be [d], slope and height [d, lines]");
  Reals accuracy({d, K});
  double* out = accuracy.mutable_data();
  const py::gil_scoped_release release;
  fastdis::host::hinge_accuracy(codes.data(), n, d, classes.data(), K, sizes.data(), centre.data(), slope.data(),
                                height.data(), out, threads);
  return accuracy;
}

// Votes of the BetaVAE and FactorVAE scores, mutual information by neighbours, and logistic regression's loss.

using Rows = py::array_t<uint32_t, py::array::c_style>;
using Places = py::array_t<int64_t, py::array::c_style>;

fastdis::host::Groups check_groups(const Reals& codes, const Rows& rows, const Places& starts, const Places& first) {
  check_that(codes.ndim() == 2 && codes.shape(0) > 0 && codes.shape(1) > 0, "codes must be [n, d]");
  check_that(rows.ndim() == 2 && rows.shape(0) > 0 && rows.shape(1) == codes.shape(0), "rows must be [K, n]");
  const int64_t K = rows.shape(0), n = rows.shape(1);
  check_that(n <= most_rows, "there must be fewer than 2**32 rows");
  check_that(first.ndim() == 1 && first.shape(0) == K + 1 && first.data()[0] == 0 && starts.ndim() == 1 &&
                 first.data()[K] == starts.shape(0),
             "first must be [K + 1], from 0 to the number of starts");
  for (int64_t k = 0; k < K; ++k) {
    const int64_t from = first.data()[k], to = first.data()[k + 1];
    check_that(to - from >= 2 && starts.data()[from] == 0 && starts.data()[to - 1] == n, "starts must go from 0 to n");
    for (int64_t i = from + 1; i < to; ++i)
      check_that(starts.data()[i] > starts.data()[i - 1], "starts must increase: every value has rows");
  }
  for (py::ssize_t i = 0; i < rows.size(); ++i) check_that(rows.data()[i] < n, "rows must be below n");
  return {rows.data(), starts.data(), first.data(), K};
}

py::tuple paired_differences(const Reals& codes, const Rows& rows, const Places& starts, const Places& first,
                             uint64_t seed, int64_t votes, int64_t pairs, int threads) {
  const fastdis::host::Groups groups = check_groups(codes, rows, starts, first);
  check_that(votes >= 1 && pairs >= 1 && pairs < UINT32_MAX, "votes and pairs must be positive");
  Reals differences({votes, int64_t{codes.shape(1)}});
  py::array_t<int32_t> factor(votes);
  double* differences_out = differences.mutable_data();
  int32_t* factor_out = factor.mutable_data();
  {
    const py::gil_scoped_release release;
    fastdis::host::paired_differences(codes.data(), codes.shape(0), codes.shape(1), groups, seed, votes, pairs, threads,
                                      differences_out, factor_out);
  }
  return py::make_tuple(differences, factor);
}

py::tuple least_varying_codes(const Reals& codes, const Rows& rows, const Places& starts, const Places& first,
                              const Reals& variances, const Places& active, uint64_t seed, int64_t votes,
                              int64_t samples, int threads) {
  const fastdis::host::Groups groups = check_groups(codes, rows, starts, first);
  check_that(votes >= 1 && samples >= 2 && samples < UINT32_MAX, "votes must be positive, and samples at least 2");
  check_that(variances.ndim() == 1 && variances.shape(0) == codes.shape(1), "variances must be [d]");
  check_that(active.ndim() == 1 && active.shape(0) >= 1, "active must name a code");
  for (py::ssize_t i = 0; i < active.size(); ++i)
    check_that(active.data()[i] >= 0 && active.data()[i] < codes.shape(1), "active must be below d");
  py::array_t<int32_t> code(votes), factor(votes);
  int32_t *code_out = code.mutable_data(), *factor_out = factor.mutable_data();
  {
    const py::gil_scoped_release release;
    fastdis::host::least_varying_codes(codes.data(), codes.shape(0), codes.shape(1), groups, variances.data(),
                                       active.data(), active.shape(0), seed, votes, samples, threads, code_out,
                                       factor_out);
  }
  return py::make_tuple(code, factor);
}

// Codes are [d, n] here.
Reals neighbour_information(const Reals& codes, const Classes& classes, int64_t neighbours, int threads) {
  check_that(codes.ndim() == 2 && codes.shape(1) > 0 && codes.shape(1) <= UINT32_MAX, "codes must be [d, n]");
  check_that(classes.ndim() == 2 && classes.shape(1) == codes.shape(1), "classes must be [K, n]");
  check_that(neighbours >= 1, "neighbours must be positive");
  const int64_t d = codes.shape(0), n = codes.shape(1), K = classes.shape(0);
  for (py::ssize_t i = 0; i < classes.size(); ++i)
    check_that(classes.data()[i] >= 0 && classes.data()[i] < n, "classes must be from 0 to n - 1");
  Reals information({d, K});
  double* out = information.mutable_data();
  const py::gil_scoped_release release;
  fastdis::host::neighbour_information(codes.data(), classes.data(), n, d, K, neighbours, threads, out);
  return information;
}

using fastdis::host::MultinomialLoss;

MultinomialLoss multinomial_loss(const Reals& x, const py::array_t<int32_t, py::array::c_style>& y, const Reals& w,
                                 int64_t classes) {
  check_that(x.ndim() == 2 && x.shape(1) >= 1 && classes >= 1, "x must be [n, features], and classes positive");
  check_that(y.size() == x.shape(0) && w.size() == x.shape(0), "y and w must be [n]");
  return {x.data(), y.data(), w.data(), x.shape(0), x.shape(1), classes};
}

// Returns (loss, gradient [classes, features]).
py::tuple evaluate(const MultinomialLoss& loss, const Reals& W, int threads) {
  check_that(W.ndim() == 2 && W.shape(0) == loss.classes() && W.shape(1) == loss.features(),
             "W must be [classes, features]");
  Reals gradient({loss.classes(), loss.features()});
  double* out = gradient.mutable_data();
  double value;
  {
    const py::gil_scoped_release release;
    value = loss(W.data(), threads, out);
  }
  return py::make_tuple(value, gradient);
}

// Coloured 3D shapes. A scene and a geometry are the numbers of the structs of the same names, in their order.

py::array_t<uint16_t> shapes3d_weights(const Reals& scene, const Reals& geometries, int64_t size, int64_t samples,
                                       int threads) {
  using Scene = fastdis::host::Shapes3dScene;
  using Geometry = fastdis::host::Shapes3dGeometry;
  constexpr py::ssize_t scene_numbers = sizeof(Scene) / sizeof(double), numbers = sizeof(Geometry) / sizeof(double);
  check_that(scene.ndim() == 1 && scene.shape(0) == scene_numbers, "scene must be [8]");
  check_that(geometries.ndim() == 2 && geometries.shape(1) == numbers, "geometries must be [g, 5]");
  check_that(size >= 1 && samples >= 1, "size and samples must be positive");
  Scene parts;
  std::memcpy(&parts, scene.data(), sizeof(parts));
  py::array_t<uint16_t> weights({int64_t{geometries.shape(0)}, int64_t{3}, size * size});
  uint16_t* out = weights.mutable_data();
  const py::gil_scoped_release release;
  fastdis::host::shapes3d_weights(parts, reinterpret_cast<const Geometry*>(geometries.data()), geometries.shape(0),
                                  size, samples, out, threads);
  return weights;
}

using Weights = py::array_t<uint16_t, py::array::c_style>;

void shapes3d_images(const Weights& weights, const Weights& colors, py::array_t<uint8_t, py::array::c_style> images,
                     int threads) {
  check_that(weights.ndim() == 3 && weights.shape(1) == 3, "weights must be [geometries, 3, pixels]");
  check_that(colors.ndim() == 3 && colors.shape(1) == 3 && colors.shape(2) == 3, "colors must be [colorings, 3, 3]");
  const int64_t geometries = weights.shape(0), pixels = weights.shape(2), colorings = colors.shape(0);
  check_that(images.ndim() == 4 && images.shape(0) == colorings && images.shape(1) == geometries &&
                 images.shape(2) == pixels && images.shape(3) == 3,
             "images must be [colorings, geometries, pixels, 3]");
  uint8_t* out = images.mutable_data();
  const py::gil_scoped_release release;
  fastdis::host::shapes3d_images(weights.data(), colors.data(), geometries, colorings, pixels, out, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of fastdis holds.";
  m.def("build_info", &build_info, "Compiler, torch, CUDA and instruction-set levels, as a dict.");
  m.def("dense_classes", &dense_classes, py::arg("factors"), py::arg("threads"));
  m.def("group_rows", &group_rows, py::arg("classes"), py::arg("sizes"), py::arg("threads"));
  m.def("discretize", &discretize, py::arg("codes"), py::arg("edges"), py::arg("threads"));
  m.def("joint_histogram", &joint_histogram, py::arg("rows"), py::arg("limit"), py::arg("columns"), py::arg("sizes"),
        py::arg("threads"));
  m.def("gaussian_histogram", &gaussian_histogram, py::arg("mean"), py::arg("std"), py::arg("edges"),
        py::arg("columns"), py::arg("sizes"), py::arg("threads"));
  m.def("segment_spread", &segment_spread, py::arg("codes"), py::arg("classes"), py::arg("sizes"), py::arg("quantile"),
        py::arg("threads"));
  m.def("boost", &boost, py::arg("codes"), py::arg("classes"), py::arg("size"), py::arg("test_codes"),
        py::arg("rounds"), py::arg("depth"), py::arg("bins"), py::arg("rate"), py::arg("seed"), py::arg("threads"));
  m.def("hinge_lines", &hinge_lines, py::arg("codes"), py::arg("classes"), py::arg("sizes"), py::arg("penalty"),
        py::arg("threads"));
  m.def("hinge_accuracy", &hinge_accuracy, py::arg("codes"), py::arg("classes"), py::arg("sizes"), py::arg("centre"),
        py::arg("slope"), py::arg("height"), py::arg("threads"));
  m.def("paired_differences", &paired_differences, py::arg("codes"), py::arg("rows"), py::arg("starts"),
        py::arg("first"), py::arg("seed"), py::arg("votes"), py::arg("pairs"), py::arg("threads"));
  m.def("least_varying_codes", &least_varying_codes, py::arg("codes"), py::arg("rows"), py::arg("starts"),
        py::arg("first"), py::arg("variances"), py::arg("active"), py::arg("seed"), py::arg("votes"),
        py::arg("samples"), py::arg("threads"));
  m.def("philox4x32", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t words[4] = {c0, c1, c2, c3};
    fastdis::host::philox4x32(words, key);
    return std::vector<uint32_t>(words, words + 4);
  });
  m.def("neighbour_information", &neighbour_information, py::arg("codes"), py::arg("classes"), py::arg("neighbours"),
        py::arg("threads"));
  py::class_<MultinomialLoss>(m, "MultinomialLoss")
      .def(py::init(&multinomial_loss), py::arg("x"), py::arg("y"), py::arg("w"), py::arg("classes"))
      .def("__call__", &evaluate, py::arg("W"), py::arg("threads"));
  m.def("shapes3d_weights", &shapes3d_weights, py::arg("scene"), py::arg("geometries"), py::arg("size"),
        py::arg("samples"), py::arg("threads"),
        "What floor, wall and object give to each pixel, uint16 [geometries, 3, size * size].");
  // Nothing is converted: the images are written where they are.
  m.def("shapes3d_images", &shapes3d_images, py::arg("weights"), py::arg("colors"), py::arg("images").noconvert(),
        py::arg("threads"), "Colour weights into images, uint8 [colorings, geometries, pixels, 3], in place.");
  bind_neighbourhoods(m);
}
