// The part of the pybind11 module fastdis._C that serves fastdis.spectral.

// The pybind11 headers that torch 2.11 and 2.12 carry refuse to be compiled for a target version.
#undef TORCH_TARGET_VERSION

#include "module.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "host/neighbourhoods.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Indices = Array<int64_t>;

// (columns [m, count], found [m, count])
py::tuple smallest(const Array<float>& values, const Indices& rows, int64_t count, int threads) {
  check_that(values.ndim() == 2 && rows.ndim() == 1, "values must be [*, n], and rows [m]");
  const int64_t n = values.shape(1), m = rows.shape(0);
  check_that(count >= 1 && count <= n, "count must be from 1 to n");
  check_that(std::all_of(rows.data(), rows.data() + m, [&](int64_t row) { return 0 <= row && row < values.shape(0); }),
             "rows must be those of values");
  Indices columns({m, count});
  Array<float> found({m, count});
  int64_t* to = columns.mutable_data();
  float* found_out = found.mutable_data();
  {
    const py::gil_scoped_release release;
    fastdis::host::smallest(values.data(), n, rows.data(), m, count, to, found_out, threads);
  }
  return py::make_tuple(columns, found);
}

template <class T>
Array<double> squared_distances(const Array<T>& points, const Array<T>& queries, const Indices& candidates,
                                int threads) {
  check_that(points.ndim() == 2 && queries.ndim() == 2 && points.shape(1) == queries.shape(1),
             "points must be [n, D], and queries [m, D]");
  check_that(candidates.ndim() == 2 && candidates.shape(0) == queries.shape(0), "candidates must be [m, count]");
  Array<double> out({candidates.shape(0), candidates.shape(1)});
  double* to = out.mutable_data();
  const py::gil_scoped_release release;
  fastdis::host::squared_distances<T>(points.data(), points.shape(0), points.shape(1), queries.data(), queries.shape(0),
                                      candidates.data(), candidates.shape(1), to, threads);
  return out;
}

template <class T>
Array<double> local_grams(const Array<T>& points, const Indices& neighbours, int threads) {
  check_that(points.ndim() == 2, "points must be [n, D]");
  check_that(neighbours.ndim() == 2 && neighbours.shape(1) >= 1, "neighbours must be [m, k]");
  const py::ssize_t m = neighbours.shape(0), k = neighbours.shape(1);
  Array<double> grams({m, k, k});
  double* to = grams.mutable_data();
  const py::gil_scoped_release release;
  fastdis::host::local_grams<T>(points.data(), points.shape(0), points.shape(1), neighbours.data(), m, k, to, threads);
  return grams;
}

// (vectors [m, k, d], values [m, d + 1], settled [m])
py::tuple leading_vectors(const Array<double>& grams, int64_t d, int threads) {
  check_that(grams.ndim() == 3 && grams.shape(1) == grams.shape(2), "grams must be [m, k, k]");
  const int64_t m = grams.shape(0), k = grams.shape(1);
  check_that(d >= 1 && d < k, "d must be from 1 to k - 1");
  Array<double> vectors({m, k, d}), values({m, d + 1});
  Array<bool> settled(m);
  double *vectors_out = vectors.mutable_data(), *values_out = values.mutable_data();
  bool* settled_out = settled.mutable_data();
  {
    const py::gil_scoped_release release;
    fastdis::host::leading_vectors(grams.data(), m, k, d, vectors_out, values_out, settled_out, threads);
  }
  return py::make_tuple(vectors, values, settled);
}

// (bases [m, k, d (d + 1) / 2], full [m])
py::tuple hessian_bases(const Array<double>& vectors, int threads) {
  check_that(vectors.ndim() == 3 && vectors.shape(2) >= 1, "vectors must be [m, k, d]");
  const int64_t m = vectors.shape(0), k = vectors.shape(1), d = vectors.shape(2);
  Array<double> bases({m, k, d * (d + 1) / 2});
  Array<bool> full(m);
  double* out = bases.mutable_data();
  bool* full_out = full.mutable_data();
  {
    const py::gil_scoped_release release;
    fastdis::host::hessian_bases(vectors.data(), m, k, d, out, full_out, threads);
  }
  return py::make_tuple(bases, full);
}

// An array that keeps what a vector held.
template <class T>
Array<T> array_of(std::vector<T>&& from) {
  auto kept = std::make_unique<std::vector<T>>(std::move(from));
  std::vector<T>* values = kept.get();
  const py::capsule owner(values, [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
  kept.release();
  return Array<T>(static_cast<py::ssize_t>(values->size()), values->data(), owner);
}

// (starts [n + 1], columns, values)
py::tuple alignment(const Indices& neighbours, const Array<double>& bases, int64_t n, bool complement, int threads) {
  check_that(neighbours.ndim() == 2 && bases.ndim() == 3 && bases.shape(0) == neighbours.shape(0) &&
                 bases.shape(1) == neighbours.shape(1),
             "neighbours must be [m, k], and bases [m, k, r]");
  fastdis::host::SparseRows rows;
  {
    const py::gil_scoped_release release;
    rows = fastdis::host::alignment(neighbours.data(), bases.data(), neighbours.shape(0), n, neighbours.shape(1),
                                    bases.shape(2), complement, threads);
  }
  return py::make_tuple(array_of(std::move(rows.starts)), array_of(std::move(rows.columns)),
                        array_of(std::move(rows.values)));
}

}  // namespace

void bind_neighbourhoods(py::module_& m) {
  m.def("smallest", &smallest, py::arg("values").noconvert(), py::arg("rows"), py::arg("count"), py::arg("threads"));
  m.def("squared_distances", &squared_distances<float>, py::arg("points").noconvert(), py::arg("queries").noconvert(),
        py::arg("candidates"), py::arg("threads"));
  m.def("squared_distances", &squared_distances<double>, py::arg("points").noconvert(), py::arg("queries").noconvert(),
        py::arg("candidates"), py::arg("threads"));
  m.def("local_grams", &local_grams<float>, py::arg("points").noconvert(), py::arg("neighbours"), py::arg("threads"));
  m.def("local_grams", &local_grams<double>, py::arg("points").noconvert(), py::arg("neighbours"), py::arg("threads"));
  m.def("leading_vectors", &leading_vectors, py::arg("grams"), py::arg("d"), py::arg("threads"));
  m.def("hessian_bases", &hessian_bases, py::arg("vectors"), py::arg("threads"));
  m.def("alignment", &alignment, py::arg("neighbours"), py::arg("bases"), py::arg("n"), py::arg("complement"),
        py::arg("threads"));
}
