// What the files that make up the pybind11 module fastdis._C share.

#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

// Throws ValueError with `what` unless it holds.
inline void check_that(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// The part that serves fastdis.spectral.
void bind_neighbourhoods(pybind11::module_& m);
