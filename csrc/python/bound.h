// Functions bound to a C++ object, for what is called at every step. pybind11 looks the types of a call up by their
// names; once a model's weights have gone through the caches, that takes longer than what is done here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>

namespace moe_native {

using Arguments = std::span<PyObject* const>;

// What stands for `def method(self, *arguments)`, where kMethod is `object T::method(Arguments)`.
template <class T, auto kMethod>
PyObject* call_bound(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  try {
    T& object = *static_cast<T*>(PyCapsule_GetPointer(self, nullptr));
    return (object.*kMethod)(Arguments(arguments, static_cast<size_t>(count))).release().ptr();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The method of `object`, which whoever calls it keeps alive. To be asked for once, and kept.
template <class T, auto kMethod>
pybind11::object bound(T& object) {
  static PyMethodDef definition{"bound",
                                reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_bound<T, kMethod>)),
                                METH_FASTCALL, nullptr};
  const pybind11::capsule self(static_cast<const void*>(&object));
  auto function = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&definition, self.ptr(), nullptr));
  if (!function) throw pybind11::error_already_set();
  return function;
}

inline void require_arguments(Arguments arguments, size_t count) {
  if (arguments.size() != count) throw pybind11::type_error("wrong number of arguments");
}

inline int64_t whole_number(PyObject* object) {
  const long long number = PyLong_AsLongLong(object);
  if (number == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return number;
}

}  // namespace moe_native
