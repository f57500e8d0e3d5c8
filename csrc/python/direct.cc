// The op's way past torch's dispatcher, for calls from Python. Once a layer's weights have gone through the caches, the
// dispatcher takes ten times as long as the copy; its tensors are read here through DLPack's C exchange instead, which
// neither allocates nor locks. What is no plain CPU tensor, as while a graph is traced, takes the dispatcher's way.
#include <Python.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "core/bindings.h"
#include "core/step_recorder.h"
#include "python/module.h"

namespace py = pybind11;

namespace moe_native {
namespace {

// DLPack 1.x, as its dlpack.h lays it out.
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocator;
  void* managed_from_object;
  void* managed_to_object;
  int (*dltensor_from_object)(void* object, DLTensor* out);
  void* current_work_stream;
};
constexpr uint32_t kDLPackMajor = 1;
constexpr int32_t kDLCpu = 1;
enum DLCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

// A copy of more rows is worth letting other Python threads run.
constexpr int64_t kManyRows = 256;

// For the life of the process.
PyObject* dispatched = nullptr;
PyTypeObject* tensor_type = nullptr;
const DLPackExchangeApi* dlpack = nullptr;

DType dtype_of(const DLTensor& t) noexcept {
  if (t.dtype_lanes != 1) return DType::kNone;
  switch (t.dtype_code << 8 | t.dtype_bits) {
    case kDLInt << 8 | 32:
      return DType::kI32;
    case kDLInt << 8 | 64:
      return DType::kI64;
    case kDLUInt << 8 | 16:
      return DType::kU16;
    case kDLUInt << 8 | 32:
      return DType::kU32;
    case kDLFloat << 8 | 16:
      return DType::kF16;
    case kDLFloat << 8 | 32:
      return DType::kF32;
    case kDLBfloat << 8 | 16:
      return DType::kBF16;
    default:
      return DType::kNone;
  }
}

bool negated(PyObject* tensor) noexcept {
  PyObject* answer = PyObject_CallMethod(tensor, "is_neg", nullptr);
  const bool yes = answer != Py_False;
  if (answer == nullptr) PyErr_Clear();
  Py_XDECREF(answer);
  return yes;
}

// False: it is for the dispatcher. The view is as the op's (csrc/torch/record_op.cc).
bool look(Binding& bound, Field field, PyObject* tensor, RowsView& view) noexcept {
  if (tensor == Py_None) return true;
  if (Py_TYPE(tensor) != tensor_type) return false;
  if ((bound.plain.load(std::memory_order_relaxed) & field) == 0) {
    if (negated(tensor)) return false;
    bound.plain.fetch_or(field, std::memory_order_relaxed);
  }
  DLTensor t;
  if (dlpack->dltensor_from_object(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (t.device_type != kDLCpu) return false;
  static constexpr std::byte kSomething{};
  view.data = &kSomething;
  view.dtype = dtype_of(t);
  if (t.ndim != 2) return true;  // the recorder says what is wrong with it
  if (t.strides == nullptr) return false;
  view.rows = t.shape[0];
  view.width = t.shape[1];
  view.row_stride = t.strides[0];
  view.column_stride = t.strides[1];
  if (t.data != nullptr) view.data = static_cast<const std::byte*>(t.data) + t.byte_offset;
  return t.data != nullptr || view.rows == 0 || view.width == 0;
}

// The op's arguments: state, topk_ids, topk_weights, router_logits, hidden, binding. False: for the dispatcher.
bool record(PyObject* const* arguments) noexcept {
  const int64_t index = PyLong_Check(arguments[5]) ? PyLong_AsLongLong(arguments[5]) : -1;
  if (index < 0) {
    PyErr_Clear();
    return false;
  }
  if (Py_TYPE(arguments[1]) != tensor_type) return false;
  Binding* bound = binding(index);
  if (bound == nullptr) return true;
  StepRecorder* recorder = bound->recorder.load(std::memory_order_acquire);
  if (recorder == nullptr || !recorder->step_open()) return true;
  const uint32_t fields = recorder->fields();
  LayerInput input;
  const auto readable = [&](Field field, PyObject* tensor, RowsView& view) {
    return (fields & field) == 0 || look(*bound, field, tensor, view);
  };
  if (!look(*bound, kFieldIds, arguments[1], input.ids) || !readable(kFieldWeights, arguments[2], input.weights) ||
      !readable(kFieldLogits, arguments[3], input.logits) || !readable(kFieldHidden, arguments[4], input.hidden)) {
    return false;
  }
  if (input.ids.rows > kManyRows || recorder->may_wait()) {
    PyThreadState* thread = PyEval_SaveThread();
    recorder->record(*bound, input);
    PyEval_RestoreThread(thread);
  } else {
    recorder->record(*bound, input);
  }
  return true;
}

PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count, PyObject* names) noexcept {
  if (count == 6 && names == nullptr && record(arguments)) Py_RETURN_NONE;
  return PyObject_Vectorcall(dispatched, arguments, static_cast<size_t>(count), names);
}

// `dispatched_op` is the op as the dispatcher runs it; `exchange` is what `tensor` has as `__dlpack_c_exchange_api__`.
// Returns a function that takes the op's arguments, or None where this version of DLPack is not known.
py::object direct(py::object dispatched_op, const py::type& tensor, const py::object& exchange) {
  const auto* api = static_cast<const DLPackExchangeApi*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->major != kDLPackMajor || api->dltensor_from_object == nullptr) return py::none();
  static PyMethodDef method = {"record", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                               METH_FASTCALL | METH_KEYWORDS, "moe_native::record, past the dispatcher"};
  dlpack = api;
  tensor_type = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  dispatched = dispatched_op.release().ptr();
  return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, nullptr));
}

}  // namespace

void define_direct(py::module_& m) {
  m.def("direct", &direct, py::arg("dispatched"), py::arg("tensor"), py::arg("exchange"));
}

}  // namespace moe_native
