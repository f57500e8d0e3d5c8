// The parts of the extension module `moe_native._C`.
#pragma once

#include <pybind11/pybind11.h>

namespace moe_native {

void define_direct(pybind11::module_& m);
void define_request_rows(pybind11::module_& m);

}  // namespace moe_native
