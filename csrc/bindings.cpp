// torch.ops.tidal, by PyTorch's stable ABI: one binary serves torch 2.11 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "ops.h"

namespace {

using tidal::AttendArguments;
using tidal::SelectArguments;
using tidal::TensorView;
using tidal::WrittenTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const char* dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

TensorView view(const Tensor& t) {
  TensorView result;
  result.data = t.data_ptr();
  result.dtype = dtype_of(t);
  result.device = t.is_cuda() ? "cuda" : t.is_cpu() ? "cpu" : "another device";
  result.device_index = t.is_cuda() ? t.get_device_index() : 0;
  result.rank = static_cast<int>(t.dim());
  for (int i = 0; i < result.rank && i < 4; ++i) {
    result.sizes[i] = t.size(i);
    result.strides[i] = t.stride(i);
  }
  return result;
}

// Writes a schema, argument by argument. Each written tensor has a letter of its own.
class Schema {
 public:
  void operator()(const char* name, const TensorView&) { add("Tensor", name); }
  void operator()(const char* name, const WrittenTensor&) { add(written(), name); }
  void operator()(const char* name, const std::optional<TensorView>&) {
    add("Tensor?", name, "=None");
  }
  void operator()(const char* name, const std::optional<WrittenTensor>&) {
    add(written() + "?", name, "=None");
  }
  void operator()(const char* name, double) { add("float", name); }
  void operator()(const char* name, int64_t) { add("int", name); }
  void operator()(const char* name, const std::optional<int64_t>&) {
    add("int?", name, "=None");
  }

  std::string of(const char* op) const { return op + ("(" + arguments_) + ") -> ()"; }

 private:
  std::string written() { return std::string("Tensor(") + alias_++ + "!)"; }
  void add(const std::string& type, const char* name, const char* value = "") {
    if (!arguments_.empty()) arguments_ += ", ";
    arguments_ += type + " " + name + value;
  }

  std::string arguments_;
  char alias_ = 'a';
};

// Takes the arguments of a call from PyTorch's stack, and keeps their tensors alive.
class Call {
 public:
  Call(StableIValue* stack, uint64_t num_arguments) : next_(stack) {
    tensors_.reserve(num_arguments);
  }

  void operator()(const char*, TensorView& to) { to = view(keep(take<Tensor>())); }
  template <class View>
  void operator()(const char*, std::optional<View>& to) {
    const auto given = take<std::optional<Tensor>>();
    if (given) static_cast<TensorView&>(to.emplace()) = view(keep(*given));
  }
  void operator()(const char*, double& to) { to = take<double>(); }
  void operator()(const char*, int64_t& to) { to = take<int64_t>(); }
  void operator()(const char*, std::optional<int64_t>& to) {
    to = take<std::optional<int64_t>>();
  }

 private:
  template <class V>
  V take() {
    return torch::stable::detail::to<V>(*next_++);
  }
  const Tensor& keep(const Tensor& t) { return tensors_.emplace_back(t); }

  StableIValue* next_;
  std::vector<Tensor> tensors_;
};

// An op as PyTorch calls it. The ops return nothing.
template <class Arguments, void (*op)(const Arguments&)>
void boxed(StableIValue* stack, uint64_t num_arguments, uint64_t) {
  Arguments arguments;
  Call call(stack, num_arguments);
  for_each_argument(arguments, call);
  op(arguments);
}

constexpr char kOccupancySchema[] =
    "occupancy(str op, str dtype, str kv_cache_dtype, int head_size, int device_index) "
    "-> int[]";

void boxed_occupancy(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const auto op = to<std::string>(stack[0]), dtype = to<std::string>(stack[1]);
  const auto kv_cache_dtype = to<std::string>(stack[2]);
  stack[0] = from(tidal::occupancy(op, dtype, kv_cache_dtype, to<int64_t>(stack[3]),
                                   to<int64_t>(stack[4])));
}

template <class Arguments>
std::string schema_of(const char* op) {
  Arguments arguments;
  Schema schema;
  for_each_argument(arguments, schema);
  return schema.of(op);
}

}  // namespace

STABLE_TORCH_LIBRARY(tidal, m) {
  m.def(schema_of<AttendArguments>("dense_decode").c_str());
  m.def(schema_of<AttendArguments>("score_blocks").c_str());
  m.def(schema_of<AttendArguments>("sparse_decode").c_str());
  m.def(schema_of<SelectArguments>("select_blocks").c_str());
  m.def(kOccupancySchema);
}

// These serve tensors of any device, so that the checks can name one on a wrong device,
// and calls without any tensor.
STABLE_TORCH_LIBRARY_IMPL(tidal, CompositeExplicitAutograd, m) {
  m.impl("dense_decode", &boxed<AttendArguments, tidal::dense_decode>);
  m.impl("score_blocks", &boxed<AttendArguments, tidal::score_blocks>);
  m.impl("sparse_decode", &boxed<AttendArguments, tidal::sparse_decode>);
  m.impl("select_blocks", &boxed<SelectArguments, tidal::select_blocks>);
  m.impl("occupancy", &boxed_occupancy);
}
