// Whose rows a serving engine's step has, from its own lists and dictionaries.
#include "python/request_rows.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <unordered_map>
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
py::handle find(py::handle dictionary, py::handle key) {
  PyObject* value = PyDict_GetItemWithError(dictionary.ptr(), key.ptr());
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

}  // namespace

void RunningRequests::add(const py::str& id, const py::object& request) {
  static_cast<void>(request.cast<const RequestRows&>());  // or that is an error, here
  forget_batch();
  requests_[id] = request;
}

py::object RunningRequests::get(const py::handle& id) const {
  const py::handle request = find(requests_, id);
  return request ? py::reinterpret_borrow<py::object>(request) : py::none();
}

py::object RunningRequests::pop(const py::handle& id) {
  py::object request = get(id);
  if (!request.is_none()) {
    forget_batch();
    if (PyDict_DelItem(requests_.ptr(), id.ptr()) != 0) throw py::error_already_set();
  }
  return request;
}

void RunningRequests::forget_batch() {
  batch_.clear();
  order_.clear();
}

py::object RunningRequests::execute(Arguments arguments) {
  require_arguments(arguments, 6);
  const auto [batch, batch_size, scheduled, speculated, positions, rows] =
      std::array<PyObject*, 6>{arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]};
  if (PyDict_Check(scheduled) == 0 || PyDict_Check(speculated) == 0 || !py::isinstance<py::array>(positions)) {
    throw py::type_error("scheduled and speculated are dictionaries, and positions an array");
  }
  const auto ids = py::reinterpret_steal<py::object>(PySequence_Fast(batch, "the batch is no sequence"));
  if (!ids) throw py::error_already_set();
  const int64_t size = std::max<int64_t>(whole_number(batch_size), 0);
  if (size > PySequence_Fast_GET_SIZE(ids.ptr())) throw py::value_error("the batch has fewer requests than it says");
  const Positions position_of(py::reinterpret_borrow<py::array>(positions));
  look_up(PySequence_Fast_ITEMS(ids.ptr()), static_cast<size_t>(size));
  count_rows(scheduled);
  const bool has_drafts = PyDict_GET_SIZE(speculated) > 0;
  parts_.clear();
  int64_t sum = 0;
  bool unknown = false;
  for (const Member& member : batch_) {
    if (member.count < 0) throw py::value_error("a request has a negative number of rows");
    const py::handle drafts = has_drafts ? find(speculated, member.id) : py::handle();
    const int64_t draft_count = drafts ? static_cast<int64_t>(py::len(drafts)) : 0;
    if (draft_count > member.count) throw py::value_error("a request has more drafts than rows");
    unknown = unknown || member.rows == nullptr;
    if (member.rows != nullptr && member.count > 0) {
      parts_.push_back({member.rows, position_of.at(sum), member.count, draft_count});
    }
    sum += member.count;
  }
  if (const int64_t expected = whole_number(rows); sum != expected) {
    throw py::value_error("the batch's requests have " + std::to_string(sum) + " rows, the step has " +
                          std::to_string(expected));
  }
  if (unknown) return py::none();
  runs_.clear();
  for (const Part& part : parts_) part.request->execute(part.first, part.count, part.drafts, runs_);
  return py::bytes(reinterpret_cast<const char*>(runs_.data()), runs_.size() * sizeof(Run));
}

// Most steps have the batch of the step before: then nothing is looked up, only compared.
void RunningRequests::look_up(PyObject* const* ids, size_t size) {
  const auto id = [](const Member& member) { return member.id.ptr(); };
  if (std::ranges::equal(batch_, std::span(ids, size), {}, id)) return;
  forget_batch();
  order_is_new_ = true;
  std::vector<Member> members;
  members.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    const py::handle request = find(requests_, ids[i]);
    members.push_back(
        {py::reinterpret_borrow<py::object>(ids[i]), request ? request.cast<RequestRows*>() : nullptr, 0});
  }
  batch_ = std::move(members);
}

// How many rows each request of the batch has. A scheduler most often names them in the order of the step before.
void RunningRequests::count_rows(PyObject* scheduled) {
  PyObject *key = nullptr, *number = nullptr;
  Py_ssize_t cursor = 0;
  if (!order_.empty() && static_cast<size_t>(PyDict_GET_SIZE(scheduled)) == order_.size()) {
    size_t same = 0;
    while (PyDict_Next(scheduled, &cursor, &key, &number) != 0) {
      Member& member = batch_[order_[same]];
      if (member.id.ptr() != key) break;
      member.count = whole_number(number);
      ++same;
    }
    if (same == order_.size()) return;
  }
  for (Member& member : batch_) {
    const py::handle found = find(scheduled, member.id);
    if (!found) throw py::key_error("request " + std::string(py::str(member.id)) + " of the batch is not scheduled");
    member.count = whole_number(found.ptr());
  }
  if (std::exchange(order_is_new_, false)) learn_order(scheduled);
}

// Which request of the batch each key is; empty where the keys are not the very objects of the batch.
void RunningRequests::learn_order(PyObject* scheduled) {
  std::unordered_map<PyObject*, size_t> place;
  for (size_t i = 0; i < batch_.size(); ++i) place[batch_[i].id.ptr()] = i;
  if (place.size() != batch_.size() || static_cast<size_t>(PyDict_GET_SIZE(scheduled)) != batch_.size()) return;
  std::vector<size_t> order;
  PyObject *key = nullptr, *number = nullptr;
  Py_ssize_t cursor = 0;
  while (PyDict_Next(scheduled, &cursor, &key, &number) != 0) {
    const auto found = place.find(key);
    if (found == place.end()) return;
    order.push_back(found->second);
  }
  order_ = std::move(order);
}

void define_request_rows(py::module_& m) {
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
  py::class_<RunningRequests>(m, "RunningRequests")
      .def(py::init<>())
      .def("add", &RunningRequests::add, py::arg("id"), py::arg("request"))
      .def("get", &RunningRequests::get, py::arg("id"))
      .def("pop", &RunningRequests::pop, py::arg("id"))
      .def("__len__", &RunningRequests::size)
      .def_property_readonly("execute", &bound<RunningRequests, &RunningRequests::execute>);
}

}  // namespace moe_native
