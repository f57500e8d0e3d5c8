// Whose rows a serving engine's step has, from its own lists and dictionaries.
#include "core/request_rows.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "python/module.h"

namespace py = pybind11;

namespace moe_native {
namespace {

// Reads rows' positions where they lie; of other dtypes than these two, a converted copy.
class Positions {
 public:
  explicit Positions(const py::array& array) : array_(array) {
    if (array_.ndim() != 1) throw py::value_error("positions must have one dimension");
    const bool as_it_is = array_.dtype().kind() == 'i' && (array_.itemsize() == 4 || array_.itemsize() == 8) &&
                          (array_.flags() & py::array::c_style) != 0;
    if (!as_it_is) array_ = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(array_);
    wide_ = array_.itemsize() == 8;
  }
  int64_t at(py::ssize_t row) const {
    if (row >= array_.size()) {
      throw py::value_error("the step has more rows than its " + std::to_string(array_.size()) + " positions");
    }
    const int64_t position =
        wide_ ? static_cast<const int64_t*>(array_.data())[row] : static_cast<const int32_t*>(array_.data())[row];
    if (position < 0 || position >= int64_t{0xFFFFFFFF}) {
      throw py::value_error("row " + std::to_string(row) + " has position " + std::to_string(position));
    }
    return position;
  }

 private:
  py::array array_;
  bool wide_ = true;
};

// Borrowed; null where there is none.
py::handle find(const py::dict& dictionary, py::handle key) {
  PyObject* value = PyDict_GetItemWithError(dictionary.ptr(), key.ptr());
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

struct Part {
  RequestRows* request;
  int64_t first, count, drafts;
};

// The runs of a step, or None where `requests` lacks one of the batch. Nothing is changed unless all is well.
py::object attribute(const py::sequence& batch, py::ssize_t batch_size, const py::dict& scheduled,
                     const py::dict& speculated, const py::dict& requests, const py::array& positions, int64_t rows) {
  const auto ids = py::reinterpret_steal<py::object>(PySequence_Fast(batch.ptr(), "the batch is no sequence"));
  if (!ids) throw py::error_already_set();
  if (batch_size > PySequence_Fast_GET_SIZE(ids.ptr())) {
    throw py::value_error("the batch has fewer requests than it says");
  }
  const Positions position_of(positions);
  std::vector<Part> parts;
  if (batch_size > 0) parts.reserve(static_cast<size_t>(batch_size));
  int64_t sum = 0;
  bool unknown = false;
  for (py::ssize_t i = 0; i < batch_size; ++i) {
    const py::handle id = PySequence_Fast_GET_ITEM(ids.ptr(), i);
    const py::handle number = find(scheduled, id);
    if (!number) throw py::key_error("request " + std::string(py::str(id)) + " of the batch is not scheduled");
    const auto count = number.cast<int64_t>();
    if (count < 0) throw py::value_error("a request has a negative number of rows");
    const py::handle request = find(requests, id);
    const py::handle drafts = speculated.empty() ? py::handle() : find(speculated, id);
    const int64_t draft_count = drafts ? static_cast<int64_t>(py::len(drafts)) : 0;
    if (draft_count > count) throw py::value_error("a request has more drafts than rows");
    unknown = unknown || !request;
    if (request && count > 0) {
      parts.push_back({request.cast<RequestRows*>(), position_of.at(sum), count, draft_count});
    }
    sum += count;
  }
  if (sum != rows) {
    throw py::value_error("the batch's requests have " + std::to_string(sum) + " rows, the step has " +
                          std::to_string(rows));
  }
  if (unknown) return py::none();
  std::vector<Run> runs;
  runs.reserve(parts.size() + 8);
  for (const Part& part : parts) part.request->execute(part.first, part.count, part.drafts, runs);
  return py::array_t<Run>(static_cast<py::ssize_t>(runs.size()), runs.data());
}

}  // namespace

void define_request_rows(py::module_& m) {
  PYBIND11_NUMPY_DTYPE_EX(Run, request, "request", position, "position", count, "count", row_class, "cls", flags,
                          "flags");
  using Media = std::vector<std::tuple<int64_t, int64_t, uint16_t>>;
  py::class_<RequestRows>(m, "RequestRows")
      .def(py::init<uint32_t, int64_t>(), py::arg("index"), py::arg("prompt"))
      .def("set_media",
           [](RequestRows& self, const Media& media) {
             std::vector<MediaSpan> spans;
             for (const auto& [first, end, modality] : media) spans.push_back({first, end, modality});
             self.set_media(std::move(spans));
           })
      .def_property_readonly("index", &RequestRows::index)
      .def_property("prompt", &RequestRows::prompt, &RequestRows::set_prompt)
      .def_property_readonly("executed", &RequestRows::executed);
  m.def("attribute", &attribute, py::arg("batch"), py::arg("batch_size"), py::arg("scheduled"), py::arg("speculated"),
        py::arg("requests"), py::arg("positions"), py::arg("rows"));
}

}  // namespace moe_native
