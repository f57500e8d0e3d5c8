// The op: moe_native::record. It reads its tensors' pointers and hands them to the recorder that the binding names.
//
// Schema. `state` is mutated in name only: that is what keeps every compiler from dropping, merging or moving the call.
//   record(Tensor(a!) state, Tensor topk_ids, Tensor topk_weights, Tensor? router_logits, Tensor? hidden, int binding)
//   -> ()
//
// Built against LibTorch's stable ABI, so that one library serves every torch from TORCH_TARGET_VERSION on. The kernel
// is boxed by hand: the header's own wrapper would allocate a shared pointer for each tensor of each call.
#include <torch/csrc/stable/library.h>

#include <array>

#include "core/bindings.h"
#include "core/step_recorder.h"

namespace moe_native {
namespace {

// An argument of the call: the callee owns the handle.
class Argument {
 public:
  explicit Argument(AtenTensorHandle handle) : handle_(handle) {}
  Argument(const Argument&) = delete;
  Argument& operator=(const Argument&) = delete;
  ~Argument() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  // Without data where the tensor is absent. Without a dtype or a width where it is there and cannot be read as rows:
  // the recorder then says so.
  RowsView view() const noexcept {
    RowsView v;
    if (handle_ == nullptr) return v;
    static constexpr std::byte kSomething{};
    v.data = &kSomething;
    int64_t dim = 0;
    int32_t dtype = 0;
    if (aoti_torch_get_dtype(handle_, &dtype) != AOTI_TORCH_SUCCESS) return v;
    v.dtype = dtype_of(dtype);
    if (aoti_torch_get_dim(handle_, &dim) != AOTI_TORCH_SUCCESS || dim != 2) return v;
    int64_t* sizes = nullptr;
    int64_t* strides = nullptr;
    void* data = nullptr;
    if (aoti_torch_get_sizes(handle_, &sizes) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_strides(handle_, &strides) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_data_ptr(handle_, &data) != AOTI_TORCH_SUCCESS) {
      return v;
    }
    v.rows = sizes[0];
    v.width = sizes[1];
    v.row_stride = strides[0];
    v.column_stride = strides[1];
    v.data = static_cast<const std::byte*>(data);
    return v;
  }

 private:
  static DType dtype_of(int32_t torch_dtype) noexcept {
    // The shim's numbers are functions, not constants: asked for once.
    static const std::array<std::pair<int32_t, DType>, 7> kKnown{{
        {aoti_torch_dtype_int32(), DType::kI32},
        {aoti_torch_dtype_float32(), DType::kF32},
        {aoti_torch_dtype_bfloat16(), DType::kBF16},
        {aoti_torch_dtype_float16(), DType::kF16},
        {aoti_torch_dtype_int64(), DType::kI64},
        {aoti_torch_dtype_uint32(), DType::kU32},
        {aoti_torch_dtype_uint16(), DType::kU16},
    }};
    for (const auto& [number, dtype] : kKnown) {
      if (number == torch_dtype) return dtype;
    }
    return DType::kNone;
  }

  AtenTensorHandle handle_;
};

AtenTensorHandle take_tensor(StableIValue value) noexcept { return reinterpret_cast<AtenTensorHandle>(value); }

// `Tensor?` travels as a pointer to a value, or null.
AtenTensorHandle take_optional(StableIValue value) noexcept {
  if (value == 0) return nullptr;
  auto* inner = reinterpret_cast<StableIValue*>(value);
  const AtenTensorHandle handle = take_tensor(*inner);
  delete inner;
  return handle;
}

void record_cpu(StableIValue* stack, uint64_t, uint64_t) noexcept {
  const Argument state(take_tensor(stack[0]));
  const Argument ids(take_tensor(stack[1]));
  const Argument weights(take_tensor(stack[2]));
  const Argument logits(take_optional(stack[3]));
  const Argument hidden(take_optional(stack[4]));
  Binding* bound = binding(static_cast<int64_t>(stack[5]));
  if (bound == nullptr) return;
  StepRecorder* recorder = bound->recorder.load(std::memory_order_acquire);
  if (recorder == nullptr || !recorder->step_open()) return;
  // What is not recorded is not looked at: after a layer's matrices have gone through the caches, each look is slow.
  const uint32_t fields = recorder->fields();
  LayerInput input;
  input.ids = ids.view();
  if ((fields & kFieldWeights) != 0) input.weights = weights.view();
  if ((fields & kFieldLogits) != 0) input.logits = logits.view();
  if ((fields & kFieldHidden) != 0) input.hidden = hidden.view();
  recorder->record(*bound, input);
}

void record_meta(StableIValue* stack, uint64_t, uint64_t) noexcept {
  const Argument arguments[] = {Argument(take_tensor(stack[0])), Argument(take_tensor(stack[1])),
                                Argument(take_tensor(stack[2])), Argument(take_optional(stack[3])),
                                Argument(take_optional(stack[4]))};
  static_cast<void>(arguments);
}

}  // namespace
}  // namespace moe_native

STABLE_TORCH_LIBRARY(moe_native, m) {
  m.def(
      "record(Tensor(a!) state, Tensor topk_ids, Tensor topk_weights, Tensor? router_logits, Tensor? hidden, int "
      "binding) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moe_native, CPU, m) { m.impl("record", &moe_native::record_cpu); }

STABLE_TORCH_LIBRARY_IMPL(moe_native, Meta, m) { m.impl("record", &moe_native::record_meta); }
