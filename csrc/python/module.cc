// Python's control over a recording: open, bind, step, flush, close, counters. The data itself goes through the torch
// op.
#include "python/module.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "core/owner.h"
#include "python/bound.h"
#include "segment/recording.h"

namespace py = pybind11;

namespace moe_native {
namespace {

constexpr const char* kLossNames[kLossCauses] = {"ring_full", "too_large",  "aborted",  "bad_input",
                                                 "no_lane",   "incomplete", "io_error", "paused"};

constexpr int kMessages = 8;  // beside a Begun

// Rows of a router's tensors, from a list of (start, count).
std::vector<RowSpan> spans_of(const py::handle& pairs, int64_t rows) {
  std::vector<RowSpan> spans;
  int64_t end = 0, sum = 0;
  for (const auto& [start, count] : pairs.cast<std::vector<std::pair<int64_t, int64_t>>>()) {
    if (start < end || count < 0) throw py::value_error("spans must ascend and not overlap");
    spans.push_back({start, count});
    end = start + count;
    sum += count;
  }
  if (!spans.empty() && sum != rows) throw py::value_error("spans must add up to n_rows");
  return spans;
}

// The items in a `bytes`, which lie aligned behind its head.
template <class T>
std::span<const T> array_of(PyObject* bytes) {
  char* data = nullptr;
  py::ssize_t size = 0;
  if (PyBytes_AsStringAndSize(bytes, &data, &size) != 0) throw py::error_already_set();
  if (static_cast<size_t>(size) % sizeof(T) != 0) throw py::value_error("not a whole number of items");
  return {reinterpret_cast<const T*>(data), static_cast<size_t>(size) / sizeof(T)};
}

// Holds a Recording; in a forked child it holds it and does nothing with it.
class Handle {
 public:
  Handle(const std::string& trace, const std::string& rank_directory, const py::bytes& run_id,
         const std::string& ring_directory, uint64_t ring_bytes, uint32_t lanes, bool block, uint32_t fields,
         bool exact_weights, uint64_t segment_bytes, uint64_t max_bytes, double flush_seconds) {
    RecordingOptions options;
    options.ring = {ring_directory, rank_directory, ring_bytes, lanes};
    const std::string id = run_id;
    if (id.size() != sizeof options.drain.identity.run_id) throw std::invalid_argument("run_id must have 16 bytes");
    std::memcpy(options.drain.identity.run_id, id.data(), id.size());
    options.drain.identity.directory = rank_directory;
    options.drain.trace = trace;
    options.drain.segment_bytes = segment_bytes;
    options.drain.max_bytes = max_bytes;
    options.drain.flush_seconds = flush_seconds;
    options.drain.exact_weights = exact_weights;
    options.overflow = block ? Overflow::kBlock : Overflow::kDrop;
    options.fields = fields;
    const py::gil_scoped_release release;
    recording_ = std::make_unique<Recording>(options);
  }

  int bind(uint16_t layer, uint32_t experts, uint32_t k, bool enabled, bool every_step, uint32_t logits_width) {
    return get().steps().bind(layer, experts, k, enabled, every_step, logits_width);
  }

  // (rows, spans: None or a list of pairs) -> Begun, and kMessages where some wait to be taken
  py::object begin_step(Arguments arguments) {
    require_arguments(arguments, 2);
    if (!usable()) return py::int_(static_cast<int>(Begun::kPaused));
    const int64_t rows = whole_number(arguments[0]);
    if (rows < 0 || rows >= int64_t{1} << 32) throw py::value_error("n_rows must be between 0 and 2**32 - 1");
    StepRecorder& steps = recording_->steps();
    std::vector<RowSpan> given;
    if (arguments[1] != Py_None) given = spans_of(arguments[1], rows);
    const bool placed = arguments[1] != Py_None && given.empty() && rows > 0;
    const RowSpan first{0, rows};
    const auto spans = given.empty() ? std::span(&first, 1) : std::span<const RowSpan>(given);
    const auto begin = [&] { return placed ? steps.begin_placed_step(rows) : steps.begin_step(spans); };
    Begun begun;
    if (steps.blocks()) {  // it may wait, and other Python threads should not
      const py::gil_scoped_release release;
      begun = begin();
    } else {
      begun = begin();
    }
    if (begun == Begun::kNested) throw std::runtime_error("a step is open already: end it before the next one begins");
    return py::int_(static_cast<int>(begun) | (recording_->messages().pending() ? kMessages : 0));
  }

  void announce(const py::bytes& runs) {
    if (usable()) recording_->steps().announce(array_of<Run>(runs.ptr()));
  }

  void place(const std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>>& places) {
    if (!usable()) return;
    if (places.size() > kMostPlaces) throw py::value_error("at most " + std::to_string(kMostPlaces) + " places");
    std::vector<Place> told;
    for (const auto& [tensor_rows, start, first, count] : places) {
      if (start < 0 || first < 0 || count < 0) throw py::value_error("a place has no negative row");
      told.push_back({tensor_rows, start, first, count});
    }
    recording_->steps().place(told);
  }
  void narrow(int64_t rows) {
    if (rows < 0) throw py::value_error("a step has no negative number of rows");
    if (usable()) recording_->steps().narrow(rows);
  }

  // (runs: bytes, token ids: bytes or None, notes: bytes, how many notes) -> whether the step is kept
  py::object end_step(Arguments arguments) {
    require_arguments(arguments, 4);
    if (!usable()) return py::bool_(false);
    StepRecorder& steps = recording_->steps();
    StepTable table;
    table.runs = array_of<Run>(arguments[0]);
    uint64_t rows = 0;
    for (const Run& run : table.runs) rows += run.count;
    if (steps.step_open() && rows != static_cast<uint64_t>(steps.step_rows())) {
      throw py::value_error("the runs have " + std::to_string(rows) + " rows, the step has " +
                            std::to_string(steps.step_rows()));
    }
    if (arguments[1] != Py_None) {
      table.tokens = array_of<uint32_t>(arguments[1]);
      if (table.tokens.size() != static_cast<size_t>(steps.step_rows())) {
        throw py::value_error("tokens must have one token id a row");
      }
    }
    table.notes = array_of<std::byte>(arguments[2]);
    table.note_count = static_cast<uint32_t>(whole_number(arguments[3]));
    if (!steps.blocks()) return py::bool_(steps.end_step(table));
    bool kept;
    {
      const py::gil_scoped_release release;
      kept = steps.end_step(table);
    }
    return py::bool_(kept);
  }

  void abort_step() {
    const py::gil_scoped_release release;  // it may wait for room
    if (usable()) recording_->steps().abort_step();
  }
  void pause(bool paused) {
    if (usable()) recording_->pause(paused);
  }
  bool paused() const { return usable() && recording_->steps().paused(); }
  void configure(uint32_t fields, bool counted) {
    if (usable()) recording_->steps().configure(fields, counted);
  }
  void enable(int index, bool enabled) {
    Binding* b = binding(index);
    if (usable() && b != nullptr) recording_->steps().enable(*b, enabled);
  }
  void capture(uint32_t fields) {
    if (usable()) recording_->steps().capture(fields);
  }
  void want(int index, bool wanted) {
    Binding* b = binding(index);
    if (usable() && b != nullptr) recording_->steps().want(*b, wanted);
  }
  py::tuple open_capture(uint32_t fields, std::optional<std::vector<uint16_t>> layers) {
    CaptureOptions options{.fields = fields, .layers = std::move(layers)};
    Captures::Opened opened;
    {
      const py::gil_scoped_release release;
      opened = get().drain().captures().open(std::move(options));
    }
    return py::make_tuple(opened.number, opened.fd);
  }
  void add_captured(uint64_t number, uint32_t request, uint32_t sample, uint32_t child, uint32_t capacity) {
    const py::gil_scoped_release release;
    get().drain().captures().add(number, request, sample, child, capacity);
  }
  py::tuple close_capture(uint64_t number) {
    Captures::Closed closed;
    {
      const py::gil_scoped_release release;
      closed = get().drain().captures().close(number);
    }
    return py::make_tuple(closed.index, closed.bytes, closed.problem);
  }
  std::vector<uint64_t> captures() {
    const py::gil_scoped_release release;
    return usable() ? recording_->drain().captures().numbers() : std::vector<uint64_t>{};
  }
  bool catch_up(double seconds) {
    if (!usable()) return false;
    const py::gil_scoped_release release;
    return recording_->drain().catch_up(seconds);
  }
  void set_metadata(const std::string& json) {
    if (usable()) recording_->drain().set_metadata(json);
  }
  bool flush(double seconds) {
    if (!usable()) return false;
    const py::gil_scoped_release release;
    return recording_->drain().flush(seconds);
  }
  void close() {
    const py::gil_scoped_release release;
    recording_->close();
  }
  void remove_ring() { recording_->remove_ring(); }
  std::vector<std::string> take_messages() { return recording_->messages().take(); }
  uint64_t ring_id() const { return recording_->ring().id(); }
  std::string ring_path() const { return recording_->ring().path(); }
  int64_t step_number() const { return usable() ? recording_->steps().step_number() : -1; }
  bool step_open() const { return usable() && recording_->steps().step_open(); }

  bool here() const { return recording_->here(); }

  py::dict counters() const {
    // The ring is not mapped in a forked child.
    if (!here()) throw std::runtime_error("this recorder belongs to the parent process");
    const Ring& ring = recording_->ring();
    const auto read = [&](size_t index) { return ring.counter(index).load(std::memory_order_relaxed); };
    py::dict out;
    out["steps_begun"] = read(kStepsBegun);
    out["steps_committed"] = read(kStepsCommitted);
    out["blocked_seconds"] = static_cast<double>(read(kBlockedNs)) * 1e-9;
    out["invalid_ids"] = read(kInvalidIds);
    out["records"] = read(kRecords);
    out["lost_for_captures"] = read(kLostForCaptures);
    py::dict lost;
    for (size_t c = 0; c < kLossCauses; ++c) {
      const LossTotals t = ring.losses(static_cast<Loss>(c));
      if (t.steps + t.layers + t.rows == 0) continue;
      py::dict cause;
      cause["steps"] = t.steps;
      cause["layers"] = t.layers;
      cause["rows"] = t.rows;
      lost[kLossNames[c]] = cause;
    }
    const py::object paused_steps = lost.attr("pop")(kLossNames[static_cast<size_t>(Loss::kPaused)], py::none());
    out["lost"] = lost;
    out["paused"] = paused_steps;
    const DrainTotals& totals = const_cast<Recording&>(*recording_).drain().totals();
    out["blocks"] = totals.blocks.load(std::memory_order_relaxed);
    out["rows_written"] = totals.rows.load(std::memory_order_relaxed);
    out["rows_stored"] = totals.stored_rows.load(std::memory_order_relaxed);
    out["raw_bytes"] = totals.raw_bytes.load(std::memory_order_relaxed);
    out["stored_bytes"] = totals.stored_bytes.load(std::memory_order_relaxed);
    out["drain_cpu_seconds"] = static_cast<double>(totals.cpu_ns.load(std::memory_order_relaxed)) * 1e-9;
    return out;
  }

 private:
  bool usable() const { return recording_->here() && !recording_->closed(); }
  Recording& get() {
    if (!usable()) throw std::runtime_error("this recorder is closed");
    return *recording_;
  }

  std::unique_ptr<Recording> recording_;
};

// A file's first bytes, mapped copy-on-write: uint8, writable. The mapping has the file, and its lock, without a
// descriptor.
py::array_t<uint8_t> map_private(int fd, size_t bytes) {
  struct stat status;
  if (::fstat(fd, &status) != 0) throw std::system_error(errno, std::generic_category(), "no file");
  if (static_cast<uint64_t>(status.st_size) < bytes) throw py::value_error("the file is shorter");
  void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
  if (mapped == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "no addresses for a capture");
  struct Mapping {
    void* data;
    size_t bytes;
  };
  const py::capsule owner(new Mapping{mapped, bytes}, [](void* held) {
    const std::unique_ptr<Mapping> mapping(static_cast<Mapping*>(held));
    ::munmap(mapping->data, mapping->bytes);
  });
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(bytes), static_cast<uint8_t*>(mapped), owner);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Control of a recording; see moe_native.Recorder.";
  py::class_<Handle>(m, "Recording")
      .def(py::init<const std::string&, const std::string&, const py::bytes&, const std::string&, uint64_t, uint32_t,
                    bool, uint32_t, bool, uint64_t, uint64_t, double>(),
           py::kw_only(), py::arg("trace"), py::arg("rank_directory"), py::arg("run_id"), py::arg("ring_directory"),
           py::arg("ring_bytes"), py::arg("lanes"), py::arg("block"), py::arg("fields"), py::arg("exact_weights"),
           py::arg("segment_bytes"), py::arg("max_bytes"), py::arg("flush_seconds"))
      .def("bind", &Handle::bind, py::arg("layer"), py::arg("experts"), py::arg("k"), py::arg("enabled"),
           py::arg("every_step"), py::arg("logits_width"))
      .def_property_readonly("begin_step", &bound<Handle, &Handle::begin_step>)
      .def("place", &Handle::place, py::arg("places"))
      .def("narrow", &Handle::narrow, py::arg("rows"))
      .def_property_readonly("end_step", &bound<Handle, &Handle::end_step>)
      .def("announce", &Handle::announce, py::arg("runs"))
      .def("abort_step", &Handle::abort_step)
      .def("pause", &Handle::pause)
      .def("configure", &Handle::configure, py::arg("fields"), py::arg("counted"))
      .def("enable", &Handle::enable, py::arg("binding"), py::arg("enabled"))
      .def("capture", &Handle::capture, py::arg("fields"))
      .def("want", &Handle::want, py::arg("binding"), py::arg("wanted"))
      .def("open_capture", &Handle::open_capture, py::arg("fields"), py::arg("layers"))
      .def("add_captured", &Handle::add_captured, py::arg("number"), py::arg("request"), py::arg("sample"),
           py::arg("child"), py::arg("capacity"))
      .def("close_capture", &Handle::close_capture, py::arg("number"))
      .def("captures", &Handle::captures)
      .def("catch_up", &Handle::catch_up, py::arg("seconds"))
      .def("set_metadata", &Handle::set_metadata)
      .def("flush", &Handle::flush, py::arg("seconds"))
      .def("close", &Handle::close)
      .def("remove_ring", &Handle::remove_ring)
      .def("counters", &Handle::counters)
      .def("take_messages", &Handle::take_messages)
      .def_property_readonly("here", &Handle::here)
      .def_property_readonly("ring_id", &Handle::ring_id)
      .def_property_readonly("ring_path", &Handle::ring_path)
      .def_property_readonly("paused", &Handle::paused)
      .def_property_readonly("step_number", &Handle::step_number)
      .def_property_readonly("step_open", &Handle::step_open);
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const std::system_error& error) {
      const py::tuple arguments = py::make_tuple(error.code().value(), std::string(error.what()));
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
  });
  m.attr("ADMITTED") = static_cast<int>(Begun::kAdmitted);
  m.attr("CAPTURED") = static_cast<int>(Begun::kForCaptures);
  m.attr("MESSAGES") = kMessages;
  define_direct(m);
  define_request_rows(m);
  m.def("map_private", &map_private, py::arg("fd"), py::arg("bytes"));
  m.def("owner", [] {
    const Owner owner = Owner::self();
    py::dict out;
    out["pid"] = owner.pid;
    out["start_ticks"] = owner.start_ticks;
    out["boot_id"] = owner.boot_id;
    return out;
  });
}

}  // namespace moe_native
