// The part of the pybind11 module fastdis._C that serves fastdis.spectral.

#pragma once

#include <pybind11/pybind11.h>

void bind_neighbourhoods(pybind11::module_& m);
