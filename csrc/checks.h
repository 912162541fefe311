// Checks of an op's arguments. Each failure throws std::invalid_argument with the text
// "<op>: <argument>.<property> is <value>; allowed: <what>".
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor_view.h"

namespace tidal {

class Checks {
 public:
  Checks(const char* op, const char* device_type) : op_(op), device_type_(device_type) {}

  template <class V, class W>
  void that(bool holds, const std::string& what, const V& value, const W& allowed) const {
    if (holds) return;
    std::ostringstream message;
    message << op_ << ": " << what << " is " << value << "; allowed: " << allowed;
    throw std::invalid_argument(message.str());
  }

  // For arguments that may be None: `given` where the op needs one, `absent` where it has
  // no use for it.
  template <class V>
  void given(const std::optional<V>& argument, const std::string& name,
             const char* allowed = "a tensor") const {
    that(argument.has_value(), name, "None", allowed);
  }

  template <class V>
  void absent(const std::optional<V>& tensor, const std::string& name) const {
    that(!tensor.has_value(), name, "a tensor", "None");
  }

  // The first tensor that is checked fixes the device of all.
  void tensor(const TensorView& t, const std::string& name, int rank,
              std::initializer_list<const char*> dtypes) {
    that(t.rank == rank, name + ".dim()", t.rank, rank);
    bool known = false;
    std::string allowed;
    for (const char* dtype : dtypes) {
      known = known || t.dtype == dtype;
      allowed += (allowed.empty() ? "" : " or ") + std::string(dtype);
    }
    that(known, name + ".dtype", t.dtype, allowed);
    that(t.device == device_type_, name + ".device", t.device, device_type_);
    if (device_index_ < 0) device_index_ = t.device_index;
    that(t.device_index == device_index_, name + ".device index", t.device_index,
         device_index_);
    for (int dim = 0; dim < rank; ++dim) {
      that(t.strides[dim] >= 0, name + stride(dim), t.strides[dim], "0 or more");
    }
    if (rank > 0 && t.sizes[rank - 1] > 1) {
      that(t.strides[rank - 1] == 1, name + stride(rank - 1), t.strides[rank - 1],
           "1: elements of the last dimension must be neighbours");
    }
  }

  void size(const TensorView& t, const std::string& name, int dim, int64_t wanted,
            const char* why) const {
    that(t.sizes[dim] == wanted, name + size(dim), t.sizes[dim],
         std::to_string(wanted) + ", " + why);
  }

  void size_at_least(const TensorView& t, const std::string& name, int dim,
                     int64_t wanted, const char* why) const {
    that(t.sizes[dim] >= wanted, name + size(dim), t.sizes[dim],
         std::to_string(wanted) + " or more, " + why);
  }

  void contiguous(const TensorView& t, const std::string& name) const {
    int64_t step = 1;
    for (int dim = t.rank - 1; dim >= 0; --dim) {
      if (t.sizes[dim] != 1) {
        that(t.strides[dim] == step, name + stride(dim), t.strides[dim],
             std::to_string(step) + ": it must be contiguous");
      }
      step *= t.sizes[dim];
    }
  }

  // For copies and loads of 16 bytes.
  void aligned(const TensorView& t, const std::string& name) const {
    const auto address = reinterpret_cast<uintptr_t>(t.data);
    that(address % 16 == 0, name + ".data_ptr()", address, "multiples of 16");
  }

  void in_range(const std::string& name, int64_t value, int64_t least) const {
    constexpr int64_t most = std::numeric_limits<int>::max();
    that(value >= least && value <= most, name, value,
         std::to_string(least) + " to " + std::to_string(most));
  }

  int device_index() const { return device_index_; }

 private:
  static std::string size(int dim) { return ".size(" + std::to_string(dim) + ")"; }
  static std::string stride(int dim) { return ".stride(" + std::to_string(dim) + ")"; }

  const char* op_;
  const char* device_type_;
  int device_index_ = -1;
};

}  // namespace tidal
