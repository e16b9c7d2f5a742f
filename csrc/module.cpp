// The pybind11 module fastdis._C: what was built, and what it runs on here. It includes no torch header.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/isa.h"

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
  info["isa_compiled"] = std::vector<std::string>(fastdis::isa_names, fastdis::isa_names + fastdis::isa_compiled);
  info["isa_highest_here"] = fastdis::isa_names[static_cast<int>(fastdis::highest_isa())];
  info["isa_in_use"] = fastdis::isa_names[static_cast<int>(fastdis::isa())];
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of fastdis holds.";
  m.def("build_info", &build_info, "Compiler, torch, CUDA and instruction-set levels, as a dict.");
}
