// Whose rows a serving engine's step has, from its own lists and dictionaries.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/request_rows.h"
#include "python/bound.h"

namespace moe_native {

// The requests under way, by the engine's ids.
//
// What a step's batch is made of is remembered, and the next one compared with it by the identity of the ids, not
// looked up: once the model's weights have gone through the caches, each object that is touched costs as much as a
// hundred instructions.
class RunningRequests {
 public:
  void add(const pybind11::str& id, const pybind11::object& request);  // a RequestRows
  pybind11::object get(const pybind11::handle& id) const;              // None where there is none
  pybind11::object pop(const pybind11::handle& id);                    // as get()
  size_t size() const { return requests_.size(); }

  // (batch, batch_size, scheduled, speculated, positions, rows) -> bytes, or None
  // A step: its rows are those of the first `batch_size` requests of the sequence `batch`, one after the other, as many
  // of each as the dictionary `scheduled` says; the last ones of them are its drafts in the dictionary `speculated`.
  // `positions` has one item a row, or more. The step's runs; None where a request is not under way. Nothing is changed
  // then, nor when it throws.
  pybind11::object execute(Arguments arguments);

 private:
  struct Member {
    pybind11::object id;
    RequestRows* rows;  // null: not under way
    int64_t count;      // its rows in this step
  };
  struct Part {
    RequestRows* request;
    int64_t first, count, drafts;
  };

  void forget_batch();
  void look_up(PyObject* const* ids, size_t size);
  void count_rows(PyObject* scheduled);
  void learn_order(PyObject* scheduled);

  pybind11::dict requests_;
  std::vector<Member> batch_;
  std::vector<size_t> order_;  // of `scheduled`: which member each key is; empty: not known
  bool order_is_new_ = false;
  std::vector<Part> parts_;
  std::vector<Run> runs_;
};

}  // namespace moe_native
